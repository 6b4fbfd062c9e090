"""The CUDA runtime calls that an engine needs, through `cuda-python`.

Call `open_cuda` before TensorRT: TensorRT 8.6 terminates the process if there is no driver.
"""

import ctypes
import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.environment import install_hint
from sopdeploy.errors import RuntimeUnavailableError

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # of cuda-python 12.6 and later, and of older versions


@dataclass(frozen=True)
class Gpu:
    """The first GPU: model name, compute capability such as `sm_90`, memory in bytes."""

    name: str
    architecture: str
    memory: int


class Cuda:
    """CUDA runtime calls that raise `RuntimeUnavailableError` on failure."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the CUDA function *name* and return its result without the status.

        Raises `RuntimeUnavailableError` if the status is not success.
        """
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            reason = getattr(status, "name", str(status))
            raise RuntimeUnavailableError(f"CUDA: {name} failed with {reason}")
        return values[0] if values else None

    def gpu(self) -> Gpu:
        """Query the first GPU."""
        properties = self.call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Gpu(
            name=name.rstrip("\0"),
            architecture=f"sm_{properties.major}{properties.minor}",
            memory=int(properties.totalGlobalMem),
        )

    def pinned_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Allocate an array in page-locked host memory, for asynchronous copies."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaHostAlloc", size, 0))
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def stream(self) -> Any:
        """Create a stream that does not synchronize with the default stream."""
        return self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def event(self) -> Any:
        """Create an event; waiting for it blocks the thread and leaves its core to the decoders."""
        flags = self._runtime.cudaEventBlockingSync | self._runtime.cudaEventDisableTiming
        return self.call("cudaEventCreateWithFlags", flags)

    def copy(self, pinned: NDArray[Any], address: int, stream: Any, *, upload: bool) -> None:
        """Copy *pinned* to the device address *address* asynchronously, or back without *upload*."""
        kinds = self._runtime.cudaMemcpyKind
        if upload:
            arguments = (address, pinned.ctypes.data, pinned.nbytes, kinds.cudaMemcpyHostToDevice)
        else:
            arguments = (pinned.ctypes.data, address, pinned.nbytes, kinds.cudaMemcpyDeviceToHost)
        self.call("cudaMemcpyAsync", *arguments, stream)

    def capture(self, enqueue: Callable[[], None], stream: Any) -> Any:
        """Capture the work that *enqueue* puts on *stream* as an executable graph, without running it.

        Raises `RuntimeUnavailableError` if CUDA cannot capture it, and the errors of *enqueue*.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(RuntimeUnavailableError):  # a failed capture must be ended too
                self.call("cudaStreamEndCapture", stream)
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)


def open_cuda() -> Cuda:
    """Open CUDA; raise `RuntimeUnavailableError` if cuda-python, the driver or a GPU is missing."""
    for name in MODULES:
        with suppress(ImportError):
            cuda = Cuda(importlib.import_module(name))
            break
    else:
        raise RuntimeUnavailableError(install_hint("cuda-python", "sopdeploy[tensorrt]"))
    try:
        count = cuda.call("cudaGetDeviceCount")
    except RuntimeUnavailableError as error:
        raise RuntimeUnavailableError(f"no NVIDIA GPU can be used here ({error})") from error
    if not count:
        raise RuntimeUnavailableError("no NVIDIA GPU can be used here (CUDA sees 0 devices)")
    return cuda
