"""The few CUDA calls that an engine needs, through `cuda-python`: one GPU, memory, streams, events.

The driver must be asked first: TensorRT 8.6 ends the process where there is none.
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

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # of cuda-python 12.6 and later, and before


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process sees first."""

    name: str
    architecture: str  # sm_90
    memory: int  # bytes


class Cuda:
    """Calls of the CUDA runtime whose failures are raised."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._thread_local = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what the CUDA function *name* gives beside its status.

        Raises `RuntimeUnavailableError` where the status is not success.
        """
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            reason = getattr(status, "name", str(status))
            raise RuntimeUnavailableError(f"CUDA: {name} failed with {reason}")
        return values[0] if values else None

    def gpu(self) -> Gpu:
        """Return the first GPU."""
        facts = self.call("cudaGetDeviceProperties", 0)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        return Gpu(
            name=name.rstrip("\0"),
            architecture=f"sm_{facts.major}{facts.minor}",
            memory=int(facts.totalGlobalMem),
        )

    def device_memory(self, size: int) -> int:
        """Return the address of *size* new bytes on the GPU."""
        return int(self.call("cudaMalloc", size))

    def pinned_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array in page-locked memory, which the GPU copies from and to by itself."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaHostAlloc", size, 0))
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def stream(self) -> Any:
        """Return a new stream that does not wait for the default one."""
        return self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def upload(self, target: int, source: NDArray[Any], stream: Any) -> None:
        """Begin to copy the pinned array *source* to the GPU's address *target*."""
        self.call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, self._to_device, stream)

    def download(self, target: NDArray[Any], source: int, stream: Any) -> None:
        """Begin to copy from the GPU's address *source* into the pinned array *target*."""
        self.call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, self._to_host, stream)

    def wait(self, stream: Any) -> None:
        """Wait until everything on *stream* is done."""
        self.call("cudaStreamSynchronize", stream)

    def captured(self, work: Callable[[], None], stream: Any) -> Any:
        """Return the graph of what *work* puts on *stream*: later one call starts it; now nothing runs.

        Raises `RuntimeUnavailableError` where CUDA cannot make a graph of it, and what *work* raises.
        """
        self.call("cudaStreamBeginCapture", stream, self._thread_local)
        try:
            work()
        except BaseException:
            with suppress(RuntimeUnavailableError):  # a broken capture must end all the same
                self.call("cudaStreamEndCapture", stream)
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Begin everything in *graph*."""
        self.call("cudaGraphLaunch", graph, stream)

    def forget(self, graph: Any) -> None:
        """Give back a graph."""
        self.call("cudaGraphExecDestroy", graph)

    def event(self) -> Any:
        """Return a new event; who waits for it sleeps, and leaves the core to the decoders."""
        kinds = self._runtime.cudaEventBlockingSync | self._runtime.cudaEventDisableTiming
        return self.call("cudaEventCreateWithFlags", kinds)

    def record(self, event: Any, stream: Any) -> None:
        """Let *event* happen when everything that is on *stream* now is done."""
        self.call("cudaEventRecord", event, stream)

    def follow(self, stream: Any, event: Any) -> None:
        """Let what comes on *stream* wait for *event*."""
        self.call("cudaStreamWaitEvent", stream, event, 0)

    def wait_for(self, event: Any) -> None:
        """Wait until *event* has happened."""
        self.call("cudaEventSynchronize", event)

    def free(self, address: int) -> None:
        """Give back memory of the GPU."""
        self.call("cudaFree", address)

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Give back a pinned array."""
        self.call("cudaFreeHost", array.ctypes.data)

    def free_event(self, event: Any) -> None:
        """Give back an event."""
        self.call("cudaEventDestroy", event)

    def free_stream(self, stream: Any) -> None:
        """Give back a stream."""
        self.call("cudaStreamDestroy", stream)


def open_cuda() -> Cuda:
    """Return CUDA with at least one GPU.

    Raises `RuntimeUnavailableError` where cuda-python, the driver or a GPU is missing.
    """
    cuda = Cuda(import_cuda())
    try:
        count = cuda.call("cudaGetDeviceCount")
    except RuntimeUnavailableError as problem:
        raise RuntimeUnavailableError(f"no NVIDIA GPU can be used here ({problem})") from problem
    if not count:
        raise RuntimeUnavailableError("no NVIDIA GPU can be used here (CUDA sees 0 devices)")
    return cuda


def import_cuda() -> Any:
    """Return cuda-python's runtime module, whichever name it has in the installed version."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RuntimeUnavailableError(install_hint("cuda-python", "sopdeploy[tensorrt]"))
