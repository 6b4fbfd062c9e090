"""Run a TensorRT engine through named tensors and `execute_async_v3`, common to versions 8.6, 10 and 11.

Two batches can be in flight: while one is computed, the next is copied to the GPU on a second stream, into
the other of two buffers. Each profile has its own execution context, because switching profiles takes time.
Kernels run in order on one stream, so both buffers share a context.

With *graphs*, each profile of a single batch size is captured as a CUDA graph per buffer after its first run,
so one call starts all kernels and copies. Other profiles change shapes between batches and cannot be
captured. If a graph fails, its profile runs without one from then on.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import Manifest, TensorRecord
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.tensorrt.binding import deserialize, last_error, make_logger
from sopdeploy.tensorrt.cuda import Cuda
from sopdeploy.tensorrt.profiles import index_for
from sopdeploy.tensorrt.record import EngineKey

BUFFERS = 2  # batches in flight

log = logging.getLogger("sopdeploy.tensorrt")


class BatchBuffer:
    """Pinned host memory and device memory for *largest* images and their outputs, with two events."""

    def __init__(self, cuda: Cuda, tensors: tuple[TensorRecord, ...], largest: int) -> None:
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, int] = {}
        for tensor in tensors:
            shape = (largest, *(int(size or 1) for size in tensor.shape[1:]))
            self.host[tensor.name] = cuda.pinned_array(shape, np.dtype(tensor.dtype))
            self.device[tensor.name] = int(cuda.call("cudaMalloc", self.host[tensor.name].nbytes))
        self.uploaded, self.done = cuda.event(), cuda.event()


class EngineSession:
    """A deserialized engine with contexts, buffers and streams. Not thread-safe."""

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        plan: bytes,
        manifest: Manifest,
        key: EngineKey,
        *,
        graphs: bool = False,
    ) -> None:
        """Load a verified *plan* of *key*.

        Raises `RuntimeUnavailableError` if the engine does not match the manifest and the key.
        """
        self._cuda, self._profiles = cuda, key.profiles
        self._logger = make_logger(trt)
        self._runtime, self.engine = deserialize(trt, plan, self._logger)
        self.largest_batch = key.largest_batch
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]
        _check_tensors(trt, self.engine, manifest, key)
        self._stream, self._upload_stream = cuda.stream(), cuda.stream()
        tensors = (*manifest.inputs, *manifest.outputs)
        self._buffers = [BatchBuffer(cuda, tensors, self.largest_batch) for _ in range(BUFFERS)]
        self._free = list(self._buffers)
        exact = (index for index, profile in enumerate(self._profiles) if profile.minimum == profile.maximum)
        self._to_capture = set(exact) if graphs else set()
        self._graphs: dict[tuple[int, BatchBuffer], Any] = {}  # by profile and buffer
        self._contexts = []
        for index, profile in enumerate(self._profiles):
            context = self.engine.create_execution_context()
            if context is None:
                reason = last_error(self._logger)
                raise RuntimeUnavailableError(f"TensorRT cannot run profile {profile}: {reason}")
            context.set_optimization_profile_async(index, int(self._stream))
            cuda.call("cudaStreamSynchronize", self._stream)
            self._contexts.append(context)

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Compute all outputs by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        return self.begin(list(images))()

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Start a batch of *images* (H, W, 3) uint8; the returned function waits for and returns its outputs.

        Call the returned function once. The images are copied before `begin` returns. Raises `RuntimeError`
        if two batches are already in flight.
        """
        if not self._free:
            raise RuntimeError(f"{BUFFERS} batches are in flight; wait for the first one")
        buffer, count = self._free.pop(), len(images)
        index = index_for(self._profiles, count)
        call = self._cuda.call
        try:
            pinned = buffer.host[self._input][:count]
            np.stack(images, out=pinned)
            self._cuda.copy(pinned, buffer.device[self._input], self._upload_stream, upload=True)
            call("cudaEventRecord", buffer.uploaded, self._upload_stream)
            call("cudaStreamWaitEvent", self._stream, buffer.uploaded, 0)
            graph = self._graphs.get((index, buffer))
            if graph is None:
                self._enqueue(index, buffer, count)
            else:
                try:
                    call("cudaGraphLaunch", graph, self._stream)
                except RuntimeUnavailableError as error:
                    raise self._drop_graphs(index, error) from error
            call("cudaEventRecord", buffer.done, self._stream)
        except BaseException:
            with suppress(RuntimeUnavailableError):  # the buffer must not be reused during a copy
                call("cudaStreamSynchronize", self._upload_stream)
                call("cudaStreamSynchronize", self._stream)
            self._free.append(buffer)
            raise
        return partial(self._end, index, buffer, count)

    def _enqueue(self, index: int, buffer: BatchBuffer, count: int) -> None:
        """Put the kernels and the copies of the outputs on the stream."""
        context, shape = self._contexts[index], (count, *buffer.host[self._input].shape[1:])
        for name, address in buffer.device.items():
            context.set_tensor_address(name, address)
        if not context.set_input_shape(self._input, shape):
            raise RuntimeError(f"TensorRT rejects images of shape {shape}: {last_error(self._logger)}")
        if not context.execute_async_v3(int(self._stream)):
            self._cuda.call("cudaStreamSynchronize", self._stream)  # raises if the device failed
            raise RuntimeError(f"TensorRT cannot run the batch: {last_error(self._logger)}")
        for name in self._outputs:
            self._cuda.copy(buffer.host[name][:count], buffer.device[name], self._stream, upload=False)

    def _end(self, index: int, buffer: BatchBuffer, count: int) -> dict[str, NDArray[np.float32]]:
        """Wait for a batch, copy its outputs and capture its profile if that is due."""
        try:
            self._cuda.call("cudaEventSynchronize", buffer.done)
            outputs = {name: buffer.host[name][:count].copy() for name in self._outputs}
        except RuntimeUnavailableError as error:
            if (index, buffer) in self._graphs:
                raise self._drop_graphs(index, error) from error
            raise
        finally:
            self._free.append(buffer)
        if index in self._to_capture and len(self._free) == BUFFERS:
            self._to_capture.discard(index)
            try:
                for each in self._buffers:
                    work = partial(self._enqueue, index, each, count)
                    self._graphs[index, each] = self._cuda.capture(work, self._stream)
            except Exception as error:  # the engine also runs without graphs
                self._drop_graphs(index, error)
                log.warning("profile %s runs without a CUDA graph: %s", self._profiles[index], error)
        return outputs

    def _drop_graphs(self, index: int, error: Exception) -> RuntimeError:
        """Destroy the graphs of a profile after *error*; return the error to raise."""
        for buffer in self._buffers:
            graph = self._graphs.pop((index, buffer), None)
            if graph is not None:
                with suppress(RuntimeUnavailableError):  # fails after device errors
                    self._cuda.call("cudaGraphExecDestroy", graph)
        return RuntimeError(f"the CUDA graph of profile {self._profiles[index]} failed: {error}")

    def close(self) -> None:
        """Destroy graphs, contexts and engine, and free all memory."""
        for index in range(len(self._profiles)):
            self._drop_graphs(index, RuntimeError("closed"))
        self._contexts.clear()
        self.engine = self._runtime = None
        for buffer in self._buffers:
            for address in buffer.device.values():
                self._cuda.call("cudaFree", address)
            for array in buffer.host.values():
                self._cuda.call("cudaFreeHost", array.ctypes.data)
            for event in (buffer.uploaded, buffer.done):
                self._cuda.call("cudaEventDestroy", event)
            buffer.host.clear()
            buffer.device.clear()
        for stream in (self._stream, self._upload_stream):
            self._cuda.call("cudaStreamDestroy", stream)
        self._buffers.clear()
        self._free.clear()


def _check_tensors(trt: Any, engine: Any, manifest: Manifest, key: EngineKey) -> None:
    """Compare names, types, shapes and profiles of *engine* with *manifest* and *key*.

    Raises `RuntimeUnavailableError` if tensors or profiles of *engine* differ.
    """
    tensors = (*manifest.inputs, *manifest.outputs)
    found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    declared = [tensor.name for tensor in tensors]
    if sorted(found) != sorted(declared):
        raise RuntimeUnavailableError(f"the engine has the tensors {found}, the manifest says {declared}")
    dtypes = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}
    for tensor in tensors:
        dtype = dtypes.get(engine.get_tensor_dtype(tensor.name), "another type")
        shape = tuple(int(size) for size in engine.get_tensor_shape(tensor.name))
        if dtype != tensor.dtype or shape[1:] != tensor.shape[1:]:
            raise RuntimeUnavailableError(
                f"the engine's {tensor.name} is {dtype} {shape}, the manifest says {tensor.dtype} "
                f"{tensor.shape}"
            )
    if engine.num_optimization_profiles != len(key.profiles):
        raise RuntimeUnavailableError(
            f"the engine has {engine.num_optimization_profiles} profiles, its record says {len(key.profiles)}"
        )
    for index, profile in enumerate(key.profiles):
        shapes = engine.get_tensor_profile_shape(manifest.inputs[0].name, index)
        batches = [int(next(iter(shape))) for shape in shapes]
        if batches != [profile.minimum, profile.optimum, profile.maximum]:
            raise RuntimeUnavailableError(
                f"profile {index} of the engine accepts batches {batches}, its record says {profile}"
            )
