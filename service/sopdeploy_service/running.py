"""A batch that a runtime was given: begun at once where the runtime can, else run when it is waited for."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sopdeploy.probes import Outputs
from sopdeploy_service.runtime.base import Overlapping, Runtime
from sopdeploy_service.stacking import Stack

Images = Sequence[NDArray[np.uint8]]


class Runner:
    """Runs batches of at most *largest* images on *runtime*; for one thread."""

    def __init__(self, runtime: Runtime, largest: int) -> None:
        self._runtime = runtime
        self._device = runtime if isinstance(runtime, Overlapping) else None
        self._stack = Stack(largest)

    @property
    def overlaps(self) -> bool:
        """Return whether a batch may be begun while another is under way."""
        return self._device is not None

    def begin(self, images: Images) -> Callable[[], Outputs]:
        """Begin a batch; what is returned gives its outputs, or raises what went wrong, once."""
        if self._device is None:
            return partial(self.run, images)
        try:
            return self._device.begin(images)
        except Exception as problem:  # told when it is this batch's turn: another one is under way
            return partial(fail, problem)

    def run(self, images: Images) -> Outputs:
        """Return the outputs of a batch."""
        if self._device is None:
            return self._runtime.run(self._stack.of(images))
        return self._device.begin(images)()


def fail(problem: Exception) -> Outputs:
    """Raise *problem*."""
    raise problem
