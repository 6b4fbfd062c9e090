"""The memory of one batch: page-locked here and on the GPU, with events that say how far the batch is."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.engines.cuda import Cuda
from sopdeploy.manifest import TensorRecord


class Slot:
    """Room for *largest* images and their outputs; *tensors* are the inputs and outputs."""

    def __init__(self, cuda: Cuda, tensors: tuple[TensorRecord, ...], largest: int) -> None:
        self._cuda = cuda
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, int] = {}
        for tensor in tensors:
            shape = (largest, *(int(size or 1) for size in tensor.shape[1:]))
            self.host[tensor.name] = cuda.pinned_array(shape, np.dtype(tensor.dtype))
            self.device[tensor.name] = cuda.device_memory(self.host[tensor.name].nbytes)
        self.uploaded, self.done = cuda.event(), cuda.event()

    def outputs(self, names: Iterable[str], count: int) -> dict[str, NDArray[np.float32]]:
        """Return copies of the first *count* rows of each output of *names*."""
        return {name: self.host[name][:count].copy() for name in names}

    def free(self) -> None:
        """Give everything back."""
        for address in self.device.values():
            self._cuda.free(address)
        for array in self.host.values():
            self._cuda.free_pinned(array)
        for event in (self.uploaded, self.done):
            self._cuda.free_event(event)
        self.host.clear()
        self.device.clear()
