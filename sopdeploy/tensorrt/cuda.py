"""The CUDA runtime calls that an engine needs, through `cuda-python`."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError


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

    def constant(self, name: str) -> Any:
        """Look up the flag or enumeration *name*."""
        return getattr(self._runtime, name)

    def gpu(self) -> Gpu:
        """Query the first GPU."""
        properties = self.call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Gpu(
            name=name.rstrip("\0"),
            architecture=f"sm_{properties.major}{properties.minor}",
            memory=int(properties.totalGlobalMem),
        )

    def copy(self, pinned: NDArray[Any], address: int, stream: Any, *, upload: bool) -> None:
        """Copy *pinned* to the device *address*, or back if *upload* is false, without waiting."""
        kinds = self._runtime.cudaMemcpyKind
        if upload:
            arguments = (address, pinned.ctypes.data, pinned.nbytes, kinds.cudaMemcpyHostToDevice)
        else:
            arguments = (pinned.ctypes.data, address, pinned.nbytes, kinds.cudaMemcpyDeviceToHost)
        self.call("cudaMemcpyAsync", *arguments, stream)


class CudaResources:
    """Memory, streams and events of one owner, released together in the reverse order."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: list[tuple[str, Any]] = []  # the function that releases, and its argument

    def _keep(self, release: str, handle: Any) -> Any:
        self._held.append((release, handle))
        return handle

    def pinned_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Allocate an array in page-locked host memory, for asynchronous copies."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._keep("cudaFreeHost", int(self._cuda.call("cudaHostAlloc", size, 0)))
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def device_memory(self, size: int) -> int:
        """Allocate *size* bytes on the GPU; the result is their address."""
        return int(self._keep("cudaFree", int(self._cuda.call("cudaMalloc", size))))

    def stream(self) -> Any:
        """Create a stream that does not synchronize with the default stream."""
        flags = self._cuda.constant("cudaStreamNonBlocking")
        return self._keep("cudaStreamDestroy", self._cuda.call("cudaStreamCreateWithFlags", flags))

    def event(self) -> Any:
        """Create an event for which a thread waits without using CPU time, which the decoders need."""
        flags = self._cuda.constant("cudaEventBlockingSync") | self._cuda.constant("cudaEventDisableTiming")
        return self._keep("cudaEventDestroy", self._cuda.call("cudaEventCreateWithFlags", flags))

    def synchronize(self) -> None:
        """Wait for the work on all streams, unless the device is lost."""
        for release, handle in self._held:
            if release == "cudaStreamDestroy":
                with suppress(RuntimeUnavailableError):
                    self._cuda.call("cudaStreamSynchronize", handle)

    def close(self) -> None:
        """Release everything, also after the loss of the device; later calls do nothing."""
        while self._held:
            release, handle = self._held.pop()
            with suppress(RuntimeUnavailableError):
                self._cuda.call(release, handle)


def open_cuda() -> Cuda:
    """Open CUDA; raise `RuntimeUnavailableError` if cuda-python, the driver or a GPU is missing."""
    runtime = import_optional(
        "cuda.bindings.runtime", "cuda-python", "sopdeploy[tensorrt]", RuntimeUnavailableError
    )
    cuda = Cuda(runtime)
    reason = "CUDA sees 0 devices"
    try:
        if cuda.call("cudaGetDeviceCount"):
            return cuda
    except RuntimeUnavailableError as error:
        reason = str(error)
    raise RuntimeUnavailableError(
        f"no NVIDIA GPU can be used here ({reason}); check the driver with nvidia-smi"
    )
