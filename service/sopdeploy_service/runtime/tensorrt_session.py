"""Run a TensorRT engine through named tensors and `execute_async_v3`.

Two batches can be in flight: while one is computed, the next is copied to the GPU on a second
stream, into the other of two buffers. Each profile has its own execution context, because
switching profiles takes time. Kernels run in order on one stream, so both buffers share a
context. CUDA is called through `cuda-python`.
"""

import ctypes
import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import import_optional
from sopdeploy.bundle.manifest import Manifest, TensorRecord
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.tensorrt_cache import EngineKey, Gpu, profile_index

OLDEST = 11  # major version of TensorRT; earlier ones parse, type and build graphs otherwise
BUFFERS = 2  # batches in flight


def import_tensorrt() -> Any:
    """Import tensorrt; raise `RuntimeUnavailableError` if it is missing or too old."""
    trt = import_optional("tensorrt", "TensorRT", ".[tensorrt]", RuntimeUnavailableError)

    if int(trt.__version__.split(".")[0]) < OLDEST:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} is too old; install {OLDEST} or later"
        )
    return trt


def reset_logger(trt: Any) -> Any:
    """Empty and return the logger of this process, which collects TensorRT's errors.

    TensorRT registers the logger of the first builder or runtime. As long as this one exists, it
    ignores other loggers.
    """
    logger = _process_logger(trt)
    logger.errors.clear()
    return logger


@functools.cache
def _process_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Collects the last error messages of TensorRT."""

        errors: ClassVar[deque[str]] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            """Store *message* if it is an error."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())

    return Logger()


def last_error(logger: Any) -> str:
    """Return the last TensorRT error of *logger* on one line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "TensorRT gave no reason"


def create(trt: Any, kind: Literal["Builder", "Runtime"], logger: Any) -> Any:
    """Create a TensorRT builder or runtime.

    Raises `RuntimeUnavailableError` with TensorRT's message if there is no GPU or the driver is
    unsuitable; TensorRT itself raises `TypeError`.
    """
    try:
        return getattr(trt, kind)(logger)
    except TypeError as error:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} cannot start here: {last_error(logger)}; "
            "`sopdeploy env` shows the driver and the GPU"
        ) from error


def deserialize(trt: Any, plan: bytes, logger: Any) -> list[Any]:
    """Deserialize *plan*; return [TensorRT runtime, engine], to be released from the end.

    The caller must have verified *plan*. Host code in plans stays disabled. Raises
    `RuntimeUnavailableError` if TensorRT cannot start or cannot load *plan*.
    """
    runtime = create(trt, "Runtime", logger)
    engine = runtime.deserialize_cuda_engine(plan)

    if engine is None:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} cannot load the plan: {last_error(logger)}; "
            "build it again with `sopdeploy engine`"
        )
    return [runtime, engine]


class Cuda:
    """CUDA runtime calls that raise `RuntimeUnavailableError` on failure."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the CUDA function *name* and return its result without the status.

        Raises `RuntimeUnavailableError` if the status is not success.
        """
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status) != 0:
            reason = getattr(status, "name", str(status))
            raise RuntimeUnavailableError(f"CUDA: {name} failed with {reason}")
        return values[0] if values else None

    def gpu(self) -> Gpu:
        """Query the first GPU."""
        properties = self.call("cudaGetDeviceProperties", 0)

        name = (
            properties.name.decode()
            if isinstance(properties.name, bytes)
            else str(properties.name)
        )

        return Gpu(
            name=name.rstrip("\0"),
            architecture=f"sm_{properties.major}{properties.minor}",
            memory=int(properties.totalGlobalMem),
        )

    def copy(self, pinned: NDArray[Any], address: int, stream: Any, *, upload: bool) -> None:
        """Copy *pinned* to the device *address*, or back if *upload* is false, without waiting."""
        kinds = self.runtime.cudaMemcpyKind

        if upload:
            arguments = (
                address,
                pinned.ctypes.data,
                pinned.nbytes,
                kinds.cudaMemcpyHostToDevice,
            )
        else:
            arguments = (
                pinned.ctypes.data,
                address,
                pinned.nbytes,
                kinds.cudaMemcpyDeviceToHost,
            )

        self.call("cudaMemcpyAsync", *arguments, stream)


class CudaResources:
    """Memory, streams and events of one owner, released together in the reverse order."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: list[tuple[str, Any]] = []  # the function that releases, and its argument
        self._streams: list[Any] = []

    def _keep(self, release: str, handle: Any) -> Any:
        """Return *handle*, and remember the function that releases it."""
        self._held.append((release, handle))
        return handle

    def allocate_pinned_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Allocate an array in page-locked host memory, for asynchronous copies."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._keep("cudaFreeHost", int(self._cuda.call("cudaHostAlloc", size, 0)))
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def allocate_device_memory(self, size: int) -> int:
        """Allocate *size* bytes on the GPU; the result is their address."""
        return int(self._keep("cudaFree", int(self._cuda.call("cudaMalloc", size))))

    def create_stream(self) -> Any:
        """Create a stream that does not synchronize with the default stream."""
        flags = self._cuda.runtime.cudaStreamNonBlocking
        self._streams.append(self._cuda.call("cudaStreamCreateWithFlags", flags))
        return self._keep("cudaStreamDestroy", self._streams[-1])

    def create_event(self) -> Any:
        """Create an event for which a thread waits without using CPU time, which the decoders need."""
        flags = (
            self._cuda.runtime.cudaEventBlockingSync | self._cuda.runtime.cudaEventDisableTiming
        )

        return self._keep(
            "cudaEventDestroy", self._cuda.call("cudaEventCreateWithFlags", flags)
        )

    def synchronize(self) -> None:
        """Wait for the work on all streams, unless the device is lost."""
        for stream in self._streams:
            with suppress(RuntimeUnavailableError):
                self._cuda.call("cudaStreamSynchronize", stream)

    def close(self) -> None:
        """Release everything, also after the loss of the device; later calls do nothing."""
        self._streams.clear()
        while self._held:
            release, handle = self._held.pop()
            with suppress(RuntimeUnavailableError):
                self._cuda.call(release, handle)


def open_cuda() -> Cuda:
    """Open CUDA; raise `RuntimeUnavailableError` if cuda-python, the driver or a GPU is missing."""
    runtime = import_optional(
        "cuda.bindings.runtime", "cuda-python", ".[tensorrt]", RuntimeUnavailableError
    )
    cuda = Cuda(runtime)

    try:
        cuda.call("cudaGetDeviceCount")  # fails without a device
    except RuntimeUnavailableError as error:
        raise RuntimeUnavailableError(
            f"no NVIDIA GPU can be used here ({error}); check the driver with nvidia-smi"
        ) from error

    return cuda


class BatchBuffer:
    """Pinned host memory and device memory for *largest* images and their outputs, with two events."""

    def __init__(
        self, resources: CudaResources, tensors: tuple[TensorRecord, ...], largest: int
    ) -> None:
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, int] = {}
        for tensor in tensors:
            # Only the first size, that of the batch, is None.
            sizes = [size for size in tensor.shape[1:] if size is not None]
            shape = (largest, *sizes)

            self.host[tensor.name] = resources.allocate_pinned_array(
                shape, np.dtype(tensor.dtype)
            )
            self.device[tensor.name] = resources.allocate_device_memory(
                self.host[tensor.name].nbytes
            )

        self.uploaded = resources.create_event()
        self.done = resources.create_event()


class EngineSession:
    """A loaded engine with buffers and streams. Not thread-safe.

    `close` and the garbage collector release everything. At process exit only the driver
    releases it, because a device that hangs must not delay the exit.
    """

    def __init__(
        self, trt: Any, cuda: Cuda, plan: bytes, manifest: Manifest, key: EngineKey
    ) -> None:
        """Load a verified *plan* of *key*.

        Raises `RuntimeUnavailableError` if TensorRT cannot load it or if the GPU has too little
        memory. On error, nothing stays allocated.
        """
        self._cuda = cuda
        self._profiles = key.profiles
        self._logger = reset_logger(trt)
        self._loaded = deserialize(trt, plan, self._logger)  # runtime and engine

        self._contexts: list[Any] = []  # one per profile
        self._resources = CudaResources(cuda)
        self._finalizer = weakref.finalize(
            self, _release, self._resources, self._contexts, self._loaded
        )
        self._finalizer.atexit = False  # at process exit the driver releases everything

        self.largest_batch = key.largest_batch
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]

        try:
            self._stream = self._resources.create_stream()
            self._upload_stream = self._resources.create_stream()
            tensors = (*manifest.inputs, *manifest.outputs)

            self._free = [
                BatchBuffer(self._resources, tensors, self.largest_batch)
                for _ in range(BUFFERS)
            ]
            self._add_contexts(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        except BaseException:  # also Ctrl-C: device memory is not freed by itself
            self.close()  # does not use the attributes that may be missing yet
            raise

    @property
    def _engine(self) -> Any:
        return self._loaded[-1]

    def _add_contexts(self, strategy: Any) -> None:
        """Create a context per profile; raise `RuntimeUnavailableError` if TensorRT cannot run one.

        The contexts share one block of device memory of the size that the largest profile
        needs, because their kernels never run at the same time.
        """
        size = int(self._engine.device_memory_size_v2)
        # 0 bytes would have no address
        shared = self._resources.allocate_device_memory(max(1, size))

        # No local variable holds the engine or a context: a traceback would keep it alive.
        for index, profile in enumerate(self._profiles):
            try:
                self._contexts.append(self._engine.create_execution_context(strategy))
                if self._contexts[index] is None:
                    raise RuntimeError("TensorRT gave no reason")

                self._contexts[index].set_device_memory(shared, size)
                if not self._contexts[index].set_optimization_profile_async(
                    index, int(self._stream)
                ):
                    raise RuntimeError("TensorRT gave no reason")

                self._cuda.call("cudaStreamSynchronize", self._stream)
            except RuntimeError as error:  # its text is the reason only if TensorRT logged none
                reason = self._logger.errors[-1] if self._logger.errors else error
                raise RuntimeUnavailableError(
                    f"TensorRT cannot run profile {profile}: {reason}"
                ) from error

    def close(self) -> None:
        """Destroy contexts and engine, and free all memory; later calls do nothing."""
        self._finalizer()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Compute all outputs by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        return self.begin(list(images))()

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Start a batch of n *images* (H, W, 3) uint8; return a function to call once, which waits for it.

        That function returns the outputs *names* by name, by default all, (n, ...) float32. Other
        outputs are not copied from the GPU. The images are copied before `begin` returns. Raises
        `RuntimeError` if two batches are in flight or TensorRT rejects the batch, `ConfigError`
        if no profile accepts that many images. Both functions raise `RuntimeUnavailableError` if
        CUDA fails.
        """
        if not self._free:
            raise RuntimeError(f"{BUFFERS} batches are in flight; wait for the first one")
        names = self._outputs if names is None else names
        count = len(images)
        index = profile_index(self._profiles, count)

        buffer = self._free.pop()
        call = self._cuda.call

        # Upload the images.
        try:
            pinned = buffer.host[self._input][:count]
            np.stack(images, out=pinned)
            self._cuda.copy(
                pinned, buffer.device[self._input], self._upload_stream, upload=True
            )
            call("cudaEventRecord", buffer.uploaded, self._upload_stream)

            # The kernels start after the upload.
            call("cudaStreamWaitEvent", self._stream, buffer.uploaded, 0)
            self._enqueue_kernels(index, buffer, count)

            # Copy the outputs back when the kernels have ended.
            for name in names:
                self._cuda.copy(
                    buffer.host[name][:count], buffer.device[name], self._stream, upload=False
                )
            call("cudaEventRecord", buffer.done, self._stream)
        except BaseException:  # also Ctrl-C: the buffer must be free again
            with suppress(RuntimeUnavailableError):  # wait: a copy may still use the buffer
                call("cudaStreamSynchronize", self._upload_stream)
                call("cudaStreamSynchronize", self._stream)
            self._free.append(buffer)
            raise

        return partial(self._wait_for_outputs, buffer, count, names)

    def _enqueue_kernels(self, index: int, buffer: BatchBuffer, count: int) -> None:
        """Enqueue the kernels of the profile *index* for *count* images in *buffer*."""
        context = self._contexts[index]
        shape = (count, *buffer.host[self._input].shape[1:])

        for name, address in buffer.device.items():
            if not context.set_tensor_address(name, address):
                raise RuntimeError(
                    f"TensorRT rejects the memory of {name}: {last_error(self._logger)}"
                )

        if not context.set_input_shape(self._input, shape):
            raise RuntimeError(
                f"TensorRT rejects images of shape {shape}: {last_error(self._logger)}"
            )

        if not context.execute_async_v3(int(self._stream)):
            # This raises its own error if the device failed.
            self._cuda.call("cudaStreamSynchronize", self._stream)
            raise RuntimeError(f"TensorRT cannot run the batch: {last_error(self._logger)}")

    def _wait_for_outputs(
        self, buffer: BatchBuffer, count: int, names: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Wait for a batch, copy its outputs, and free its buffer also if that fails."""
        try:
            self._cuda.call("cudaEventSynchronize", buffer.done)
            return {name: buffer.host[name][:count].copy() for name in names}
        finally:
            self._free.append(buffer)


def _release(resources: CudaResources, contexts: list[Any], loaded: list[Any]) -> None:
    """Release what a session held; not a method, because the session may be deleted already."""
    resources.synchronize()
    contexts.clear()
    while loaded:  # the engine, then its runtime
        loaded.pop()
    resources.close()
