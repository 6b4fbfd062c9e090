"""Running an engine: named tensors and `execute_async_v3`, which 8.6, 10 and 11 have in common.

Every profile has an execution context of its own, because switching one costs time; the buffers, as large as
the largest batch, and the stream are shared, because one batch runs at a time.

With *graphs* a profile of one batch size becomes a CUDA graph after its first run: copies and kernels then
start by one call. Only those profiles: a graph holds for the shape it was captured with, and the context of a
wider profile changes its shape from batch to batch. What fails as a graph is run without one from then on.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.engines.binding import deserialize, last_error, make_logger
from sopdeploy.engines.cuda import Cuda
from sopdeploy.engines.profiles import Profile, index_for
from sopdeploy.engines.record import EngineKey, Via
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.manifest import Manifest, TensorRecord

log = logging.getLogger("sopdeploy.engines")


class EngineSession:
    """A deserialised engine with its contexts, pinned buffers and stream; used by one thread at a time."""

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
        """Load *plan* of *key*, whose hash was checked.

        Raises `RuntimeUnavailableError` where it is no such engine.
        """
        self._cuda, self._profiles = cuda, key.profiles
        self._logger = make_logger(trt)
        self._runtime, self.engine = deserialize(trt, plan, self._logger)
        self.largest_batch = key.largest_batch
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]
        self._names = tensor_names(self.engine, manifest, key.via)
        refuse_another_engine(trt, self.engine, manifest, self._names, self._profiles)
        self._stream = cuda.stream()
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, int] = {}
        for tensor in (*manifest.inputs, *manifest.outputs):
            shape = (self.largest_batch, *(int(size or 1) for size in tensor.shape[1:]))
            self._host[tensor.name] = cuda.pinned_array(shape, np.dtype(tensor.dtype))
            self._device[tensor.name] = cuda.device_memory(self._host[tensor.name].nbytes)
        exact = (index for index, profile in enumerate(self._profiles) if profile.minimum == profile.maximum)
        self._to_capture = set(exact) if graphs else set()
        self._graphs: dict[int, Any] = {}  # by profile
        self._contexts = [self._make_context(index) for index in range(len(self._profiles))]

    def _make_context(self, index: int) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise RuntimeUnavailableError(
                f"TensorRT cannot run profile {self._profiles[index]}: {last_error(self._logger)}"
            )
        context.set_optimization_profile_async(index, int(self._stream))
        self._cuda.wait(self._stream)
        for name, address in self._device.items():
            context.set_tensor_address(self._names[name], address)
        return context

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        count = len(images)
        index = index_for(self._profiles, count)
        self._host[self._input][:count] = images
        if index in self._graphs:
            self._launch(index)
        else:
            context = self._contexts[index]
            if not context.set_input_shape(self._names[self._input], images.shape):
                reason = last_error(self._logger)
                raise RuntimeError(f"TensorRT refuses images of shape {images.shape}: {reason}")
            self._enqueue(context, count)
            self._cuda.wait(self._stream)
        found = {name: self._host[name][:count].copy() for name in self._outputs}
        if index in self._to_capture:
            self._capture(index, count)
        return found

    @property
    def captured(self) -> tuple[Profile, ...]:
        """Return the profiles that run as a graph now."""
        return tuple(self._profiles[index] for index in sorted(self._graphs))

    def _enqueue(self, context: Any, count: int) -> None:
        """Put copies and kernels for *count* images on the stream."""
        self._cuda.upload(self._device[self._input], self._host[self._input][:count], self._stream)
        if not context.execute_async_v3(int(self._stream)):
            self._cuda.wait(self._stream)  # names CUDA's code where the device is what failed
            raise RuntimeError(f"TensorRT cannot run the batch: {last_error(self._logger)}")
        for name in self._outputs:
            self._cuda.download(self._host[name][:count], self._device[name], self._stream)

    def _capture(self, index: int, count: int) -> None:
        """Make the graph of a profile whose context has just run; where that fails, it is not tried again."""
        self._to_capture.discard(index)
        context = self._contexts[index]
        try:
            self._graphs[index] = self._cuda.captured(lambda: self._enqueue(context, count), self._stream)
        except Exception as problem:  # whatever is wrong with the graph, the engine runs without it
            log.warning("profile %s runs without a CUDA graph: %s", self._profiles[index], problem)

    def _launch(self, index: int) -> None:
        """Run the graph of a profile; one that fails is given up, so that the next batch runs without it."""
        try:
            self._cuda.launch(self._graphs[index], self._stream)
            self._cuda.wait(self._stream)
        except RuntimeUnavailableError as problem:
            self._forget(index)
            raise RuntimeError(
                f"the CUDA graph of profile {self._profiles[index]} failed: {problem}"
            ) from problem

    def _forget(self, index: int) -> None:
        with suppress(RuntimeUnavailableError):  # after an error of the device nothing can be given back
            self._cuda.forget(self._graphs.pop(index))

    def close(self) -> None:
        """Give back graphs, contexts, engine and memory."""
        for index in list(self._graphs):
            self._forget(index)
        self._contexts.clear()
        self.engine = self._runtime = None
        self._cuda.free(list(self._device.values()), list(self._host.values()), self._stream)
        self._host.clear()
        self._device.clear()

    def __enter__(self) -> "EngineSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tensor_names(engine: Any, manifest: Manifest, via: Via) -> dict[str, str]:
    """Return what *engine* calls each tensor of the manifest.

    torch-tensorrt names outputs by number, so there the order counts; types, shapes and the probes say
    whether it is right. Raises `RuntimeUnavailableError` where there are other tensors.
    """
    found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    declared = [tensor.name for tensor in (*manifest.inputs, *manifest.outputs)]
    if via == "torch-tensorrt" and len(found) == len(declared):
        return dict(zip(declared, found, strict=True))
    if sorted(found) != sorted(declared):
        raise RuntimeUnavailableError(f"the engine has the tensors {found}, the manifest says {declared}")
    return {name: name for name in declared}


def refuse_another_engine(
    trt: Any, engine: Any, manifest: Manifest, names: Mapping[str, str], profiles: Sequence[Profile]
) -> None:
    """Refuse an *engine* whose tensors are not the manifest's or whose profiles are not *profiles*."""
    for tensor in (*manifest.inputs, *manifest.outputs):
        refuse_another_tensor(trt, engine, tensor, names[tensor.name])
    if engine.num_optimization_profiles != len(profiles):
        raise RuntimeUnavailableError(
            f"the engine has {engine.num_optimization_profiles} profiles, its record says {len(profiles)}"
        )
    for index, profile in enumerate(profiles):
        shapes = engine.get_tensor_profile_shape(names[manifest.inputs[0].name], index)
        batches = [int(next(iter(shape))) for shape in shapes]
        if batches != [profile.minimum, profile.optimum, profile.maximum]:
            raise RuntimeUnavailableError(
                f"profile {index} of the engine takes batches {batches}, its record says {profile}"
            )


def refuse_another_tensor(trt: Any, engine: Any, tensor: TensorRecord, name: str) -> None:
    """Refuse an *engine* where *tensor*, there called *name*, has another type or shape than is said."""
    kinds = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}
    kind = kinds.get(engine.get_tensor_dtype(name), "another type")
    shape = tuple(int(size) for size in engine.get_tensor_shape(name))
    if kind != tensor.dtype or shape[1:] != tensor.shape[1:]:
        raise RuntimeUnavailableError(
            f"the engine's {tensor.name} is {kind} {shape}, the manifest says {tensor.dtype} {tensor.shape}"
        )
