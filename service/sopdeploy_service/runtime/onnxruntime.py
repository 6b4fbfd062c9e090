"""onnxruntime on the CPU, or on a GPU with CUDA."""

import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.environment import EXACT_INT8, SLOW_INT8, import_optional, lacks_vnni, usable_cores
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import padded_sizes, reason_of
from sopdeploy_service.runtime.cuda_libraries import DOWNLOAD, UPLOAD, device_copy, load_cuda_libraries

log = logging.getLogger("sopdeploy.service")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "use_tf32": "0",  # fp32 in the graph stays fp32
    "cudnn_conv_algo_search": "HEURISTIC",  # the default measures every algorithm whenever the size changes
}
# onnxruntime runs these on the CPU if they compute a shape, and only then: all have CUDA kernels.
SHAPE_OPERATORS = {"Shape", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Add", "Mul"}
PREFER_NHWC = {
    "prefer_nhwc": "1"
}  # the layout of tensor cores: otherwise cuDNN transposes around convolutions
DEVICES = {CPU: "cpu", CUDA: "cuda:0"}


@dataclass(frozen=True, slots=True)
class Binding:
    """The input and outputs of one batch size on the device, bound to the session.

    *host* is the buffer in which the images of a batch are collected; for a GPU, it is page-locked.
    """

    host: NDArray[np.uint8]
    images: Any
    outputs: Mapping[str, Any]
    io_binding: Any


def cuda_options(precision: str) -> dict[str, str]:
    """Return the options of the CUDA provider for a graph in *precision*."""
    return CUDA_OPTIONS | PREFER_NHWC if precision == "fp16" else CUDA_OPTIONS


@cache
def pinned_memory(onnxruntime: Any) -> Any:
    """Register an allocator of page-locked memory, from which a GPU reads without a copy by the driver."""
    arena, output = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.CPU_OUTPUT
    memory = onnxruntime.OrtMemoryInfo("CudaPinned", arena, 0, output)
    onnxruntime.create_and_register_allocator_v2(CUDA, memory, {}, onnxruntime.OrtArenaCfg(0, -1, -1, -1))
    return memory


class BoundSession:
    """Runs *session* on tensors that stay on *device*, such as `cuda:0`; at most two batches are in flight.

    *image* is the name of the input; *outputs* has the shape of each float32 output without the batch.
    Batches are padded to one of *sizes*, because cuDNN plans every convolution anew when the size changes.
    Batches run in order in a thread of their own, so the next one is uploaded meanwhile, into other buffers.
    """

    def __init__(
        self,
        onnxruntime: Any,
        session: Any,
        device: str,
        image: str,
        outputs: Mapping[str, tuple[int | None, ...]],
        sizes: Sequence[int],
    ) -> None:
        self._onnxruntime, self._session = onnxruntime, session
        kind, _, number = device.partition(":")
        self._device = (kind, int(number or 0))
        self._copy = device_copy(onnxruntime, kind)
        self._image, self._shapes, self._sizes = image, outputs, sizes
        self._free: defaultdict[int, list[Binding]] = defaultdict(list)  # by padded size
        self._jobs: SimpleQueue[tuple[Any, Future[None]] | None] = SimpleQueue()
        self._end_thread = weakref.finalize(self, self._jobs.put, None)
        # A daemon: a device that hangs must not delay the exit.
        self._thread = Thread(target=_run_jobs, args=(session, self._jobs), name="onnxruntime", daemon=True)
        self._thread.start()

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str]
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3) uint8; return a function that waits for its outputs *names*.

        Call this function once; outputs are (n, ...) float32. The images are copied before `begin` returns.
        """
        count = len(images)
        size = next((size for size in self._sizes if size >= count), count)
        free, done = self._free[size], Future[None]()
        binding = free.pop() if free else self._bind((size, *images[0].shape))
        try:
            pixels = np.stack(images, out=binding.host[:count])
            self._copy(binding.images.data_ptr(), pixels.ctypes.data, pixels.nbytes, UPLOAD)
        except BaseException:
            free.append(binding)
            raise
        self._jobs.put((binding.io_binding, done))

        def end() -> dict[str, NDArray[np.float32]]:
            try:
                done.result()
                return {name: self._download(binding.outputs[name], count) for name in names}
            finally:
                free.append(binding)

        return end

    def close(self) -> None:
        """Release the session and the tensors; no batch may be in flight. Later calls do nothing."""
        self._end_thread()
        self._thread.join()
        self._session = None
        self._free.clear()

    def _download(self, output: Any, count: int) -> NDArray[np.float32]:
        """Copy the first *count* rows of *output* from the device."""
        rows = np.empty((count, *output.shape()[1:]), np.float32)
        self._copy(rows.ctypes.data, output.data_ptr(), rows.nbytes, DOWNLOAD)
        return rows

    def _bind(self, shape: tuple[int, ...]) -> Binding:
        value = self._onnxruntime.OrtValue
        io_binding = self._session.io_binding()
        memory = pinned_memory(self._onnxruntime) if self._device[0] == "cuda" else None
        host = value.ortvalue_from_shape_and_type(shape, np.uint8, memory_info=memory).numpy()
        host.fill(0)
        on_device = value.ortvalue_from_numpy(host, *self._device)
        io_binding.bind_ortvalue_input(self._image, on_device)
        outputs = {
            name: value.ortvalue_from_shape_and_type((shape[0], *rest), np.float32, *self._device)
            for name, rest in self._shapes.items()
        }
        for name, output in outputs.items():
            io_binding.bind_ortvalue_output(name, output)
        return Binding(host, on_device, outputs, io_binding)


def _run_jobs(session: Any, jobs: "SimpleQueue[tuple[Any, Future[None]] | None]") -> None:
    """Run the bindings in *jobs* until None is queued."""
    while (job := jobs.get()) is not None:
        io_binding, done = job
        try:
            session.run_with_iobinding(io_binding)
        except Exception as error:  # raised where the outputs are due
            done.set_exception(error)
        else:
            done.set_result(None)
        del job, io_binding, done  # the idle thread must not keep the memory of a batch alive


class OnnxRuntime:
    """A session on `model.onnx` of a bundle, on the CPU."""

    _provider = CPU

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load *bundle*; *threads* defaults to one per core.

        Raises `RuntimeUnavailableError` if onnxruntime is not installed, cannot load the graph, or would run
        it on another provider.
        """
        self._onnxruntime = onnxruntime = import_onnxruntime()
        manifest = bundle.manifest
        if self._provider != CPU and self._provider in onnxruntime.get_available_providers():
            load_cuda_libraries(onnxruntime)
            onnxruntime.set_default_logger_severity(4)  # as below, for the provider
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.device = DEVICES[self._provider]
        self.largest_batch = manifest.batch.maximum
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]
        self._session = _open_session(onnxruntime, bundle, threads or usable_cores(), self._provider)
        if self._provider == CPU and manifest.precision == "int8" and lacks_vnni():
            log.info("%s: %s", bundle.name, SLOW_INT8)

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        values = self._session.run(self._outputs, {self._input: images})
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """Release the session."""
        self._session = None


class CudaOnnxRuntime(OnnxRuntime):
    """A session on a GPU, in which two batches can be in flight."""

    _provider = CUDA

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load *bundle* as `OnnxRuntime` does; *threads* compute shapes."""
        super().__init__(bundle, threads=threads)
        shapes = {output.name: output.shape[1:] for output in bundle.manifest.outputs}
        sizes = padded_sizes(self.largest_batch)
        self._bound = BoundSession(self._onnxruntime, self._session, self.device, self._input, shapes, sizes)

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        return self.begin(list(images))()

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); return a function that waits for *names*, by default all."""
        return self._bound.begin(images, self._outputs if names is None else names)

    def close(self) -> None:
        """Release the session and the tensors on the device."""
        super().close()
        self._bound.close()


def import_onnxruntime() -> Any:
    """Import onnxruntime; raise `RuntimeUnavailableError` if it is not installed."""
    return import_optional("onnxruntime", "onnxruntime", "sopdeploy[cpu]", RuntimeUnavailableError)


def session_options(onnxruntime: Any, threads: int, provider: str) -> Any:
    """Return the options of a session on *provider*, with *threads* on the CPU."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as exceptions
    # Spinning threads would take the cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # The optimizer of quantized graphs adds operators on int32 biases, which have no CUDA kernel.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_graph(
    onnxruntime: Any, path: str, options: Any, provider: str, provider_options: Mapping[str, str]
) -> Any:
    """Open the graph at *path* on *provider*; *options* are `session_options`.

    With `prefer_nhwc`, onnxruntime moves the operators that compute shapes to the GPU, and copies shapes
    between GPU and CPU in every run. A graph with more operators Shape than Conv, such as that of a
    transformer, is therefore opened without it.
    """
    session = onnxruntime.InferenceSession(
        path,
        options,
        providers=[(provider, dict(provider_options))],
        enable_fallback=0,  # otherwise it falls back to the CPU after errors
    )
    if not PREFER_NHWC.items() <= provider_options.items():
        return session
    assigned = session.get_provider_graph_assignment_info()
    operators = Counter(node.op_type for subgraph in assigned for node in subgraph.get_nodes())
    if operators["Shape"] <= operators["Conv"]:
        return session
    del session  # its weights are on the GPU
    return open_graph(onnxruntime, path, options, provider, CUDA_OPTIONS)


def operators_on_cpu(session: Any) -> list[str]:
    """Return the operators of a GPU's *session* that run on the CPU, except those that compute shapes.

    *session* was opened with `session_options`. Copying activations between GPU and CPU is slower than a CPU
    alone. Shapes are on the CPU in any case.
    """
    return sorted(
        {
            node.op_type
            for subgraph in session.get_provider_graph_assignment_info()
            if subgraph.ep_name == CPU
            for node in subgraph.get_nodes()
        }
        - SHAPE_OPERATORS
    )


def _open_session(onnxruntime: Any, bundle: Bundle, threads: int, provider: str) -> Any:
    """Open a session on *provider* only and check the tensors of the graph.

    onnxruntime adds the CPU provider by itself; with another *provider* only shapes may be computed there.
    """
    version = onnxruntime.__version__
    options = session_options(onnxruntime, threads, provider)
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            f"onnxruntime {version} has no {provider} here; "
            'run: pip install "sopdeploy[gpu]" in an environment without [cpu]'
        )
    try:
        provider_options = cuda_options(bundle.manifest.precision) if provider == CUDA else {}
        session = open_graph(onnxruntime, str(bundle.onnx), options, provider, provider_options)
    except Exception as error:  # onnxruntime's errors share no base class
        reason = f"cannot load the graph: {reason_of(error)}"
        raise RuntimeUnavailableError(f"{bundle.onnx}: onnxruntime {version} {reason}") from error
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{bundle.onnx}: asked for {provider}, onnxruntime chose {session.get_providers()}"
        )
    if provider != CPU and (operators := operators_on_cpu(session)):
        raise RuntimeUnavailableError(
            f"{bundle.onnx}: onnxruntime {version} runs {', '.join(operators)} on the CPU instead of "
            f"{DEVICES[provider]}; export the checkpoint again, for int8 with int8_for=tensorrt",
            remedies={"runtime": "onnxruntime-cpu"},
        )
    declared = [tensor.name for tensor in (*bundle.manifest.inputs, *bundle.manifest.outputs)]
    tensors = [tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())]
    if tensors != declared:
        raise RuntimeUnavailableError(
            f"{bundle.onnx}: the graph has the tensors {tensors}, the manifest says {declared}; "
            "export the bundle again"
        )
    return session


def has_cuda() -> bool:
    """Return whether the installed onnxruntime supports CUDA."""
    try:
        return CUDA in import_onnxruntime().get_available_providers()
    except RuntimeUnavailableError:
        return False
