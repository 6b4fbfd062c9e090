"""Running an engine: named tensors and `execute_async_v3`, which 8.6, 10 and 11 have in common.

Two batches may be under way: while one is computed, the next is copied to the GPU on a stream of its own,
into the other of two slots of memory. Every profile has an execution context of its own, because switching
one costs time; kernels run on one stream, one batch after the other, so a context serves both slots.

With *graphs* a profile of one batch size becomes a CUDA graph for each slot after its first run: kernels and
the copies back then start by one call. Only those profiles: a graph holds for the shape it was captured with,
and the context of a wider profile changes its shape from batch to batch. What fails as a graph is run without
one from then on.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import Manifest, TensorRecord
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.tensorrt.binding import deserialize, last_error, make_logger
from sopdeploy.tensorrt.cuda import Cuda
from sopdeploy.tensorrt.profiles import Profile, index_for
from sopdeploy.tensorrt.record import EngineKey, Via


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


SLOTS = 2  # batches that may be under way

log = logging.getLogger("sopdeploy.tensorrt")


class EngineSession:
    """A deserialised engine with its contexts, slots of memory and streams; for one thread at a time."""

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
        self._stream, self._uploads = cuda.stream(), cuda.stream()
        tensors = (*manifest.inputs, *manifest.outputs)
        self._slots = [Slot(cuda, tensors, self.largest_batch) for _ in range(SLOTS)]
        self._free = list(self._slots)
        exact = (index for index, profile in enumerate(self._profiles) if profile.minimum == profile.maximum)
        self._to_capture = set(exact) if graphs else set()
        self._graphs: dict[tuple[int, Slot], Any] = {}  # by profile and slot
        self._contexts = [self._make_context(index) for index in range(len(self._profiles))]

    def _make_context(self, index: int) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise RuntimeUnavailableError(
                f"TensorRT cannot run profile {self._profiles[index]}: {last_error(self._logger)}"
            )
        context.set_optimization_profile_async(index, int(self._stream))
        self._cuda.wait(self._stream)
        return context

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        return self.begin(list(images))()

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); what is returned waits for it, once, and gives its outputs.

        The images are copied before this returns. Raises `RuntimeError` where two are under way already.
        """
        if not self._free:
            raise RuntimeError(f"{SLOTS} batches are under way; wait for the first of them")
        slot, count = self._free.pop(), len(images)
        index = index_for(self._profiles, count)
        try:
            self._upload(slot, images)
            self._start(index, slot, count)
            self._cuda.record(slot.done, self._stream)
        except BaseException:
            with suppress(RuntimeUnavailableError):  # nobody may write into a slot that is being copied
                self._cuda.wait(self._uploads)
                self._cuda.wait(self._stream)
            self._free.append(slot)
            raise
        return partial(self._end, index, slot, count)

    @property
    def captured(self) -> tuple[Profile, ...]:
        """Return the profiles that run as a graph now."""
        return tuple(self._profiles[index] for index in sorted({index for index, _ in self._graphs}))

    def _upload(self, slot: Slot, images: Sequence[NDArray[np.uint8]]) -> None:
        pinned = slot.host[self._input][: len(images)]
        np.stack(images, out=pinned)
        self._cuda.upload(slot.device[self._input], pinned, self._uploads)
        self._cuda.record(slot.uploaded, self._uploads)
        self._cuda.follow(self._stream, slot.uploaded)

    def _start(self, index: int, slot: Slot, count: int) -> None:
        """Put kernels and copies back on the stream, as a graph where there is one."""
        graph = self._graphs.get((index, slot))
        if graph is None:
            self._enqueue(index, slot, count)
            return
        try:
            self._cuda.launch(graph, self._stream)
        except RuntimeUnavailableError as problem:
            raise self._without_graph(index, problem) from problem

    def _enqueue(self, index: int, slot: Slot, count: int) -> None:
        context, shape = self._contexts[index], (count, *slot.host[self._input].shape[1:])
        for name, address in slot.device.items():
            context.set_tensor_address(self._names[name], address)
        if not context.set_input_shape(self._names[self._input], shape):
            reason = last_error(self._logger)
            raise RuntimeError(f"TensorRT refuses images of shape {shape}: {reason}")
        if not context.execute_async_v3(int(self._stream)):
            self._cuda.wait(self._stream)  # names CUDA's code where the device is what failed
            raise RuntimeError(f"TensorRT cannot run the batch: {last_error(self._logger)}")
        for name in self._outputs:
            self._cuda.download(slot.host[name][:count], slot.device[name], self._stream)

    def _end(self, index: int, slot: Slot, count: int) -> dict[str, NDArray[np.float32]]:
        try:
            self._cuda.wait_for(slot.done)
            found = slot.outputs(self._outputs, count)
        except RuntimeUnavailableError as problem:
            if (index, slot) in self._graphs:
                raise self._without_graph(index, problem) from problem
            raise
        finally:
            self._free.append(slot)
        if index in self._to_capture and len(self._free) == SLOTS:
            self._capture(index, count)
        return found

    def _capture(self, index: int, count: int) -> None:
        """Make the graphs of a profile whose context has just run; what fails is not tried again."""
        self._to_capture.discard(index)
        try:
            for slot in self._slots:
                work = partial(self._enqueue, index, slot, count)
                self._graphs[index, slot] = self._cuda.captured(work, self._stream)
        except Exception as problem:  # whatever is wrong with a graph, the engine runs without it
            self._forget(index)
            log.warning("profile %s runs without a CUDA graph: %s", self._profiles[index], problem)

    def _without_graph(self, index: int, problem: RuntimeUnavailableError) -> RuntimeError:
        """Give up the graphs of a profile, one of which failed: the next batch runs without."""
        self._forget(index)
        return RuntimeError(f"the CUDA graph of profile {self._profiles[index]} failed: {problem}")

    def _forget(self, index: int) -> None:
        for slot in self._slots:
            graph = self._graphs.pop((index, slot), None)
            with suppress(RuntimeUnavailableError):  # after an error of the device nothing can be given back
                if graph is not None:
                    self._cuda.forget(graph)

    def close(self) -> None:
        """Give back graphs, contexts, engine and memory."""
        for index in range(len(self._profiles)):
            self._forget(index)
        self._contexts.clear()
        self.engine = self._runtime = None
        for slot in self._slots:
            slot.free()
        for stream in (self._stream, self._uploads):
            self._cuda.free_stream(stream)
        self._slots.clear()
        self._free.clear()

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
