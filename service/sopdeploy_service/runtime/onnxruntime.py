"""onnxruntime on the CPU, or on a GPU with CUDA."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import (
    EXACT_INT8,
    SLOW_INT8,
    import_optional,
    install_command,
    lacks_vnni,
    usable_cores,
)
from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import (
    OwnRuntime,
    is_out_of_memory,
    padded_sizes,
    readable_reason,
)
from sopdeploy_service.runtime.cuda_libraries import load_cuda_libraries
from sopdeploy_service.settings import Settings

log = logging.getLogger("sopdeploy.service")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "use_tf32": "0",  # fp32 in the graph stays fp32
    # By default, every algorithm is measured whenever the size changes.
    "cudnn_conv_algo_search": "HEURISTIC",
}
# onnxruntime runs these on the CPU if they compute a shape, and only then: all have CUDA
# kernels.
SHAPE_OPERATORS = {
    "Shape",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Cast",
    "Add",
    "Mul",
}
PREFER_NHWC = {"prefer_nhwc": "1"}
DEVICES = {CPU: "cpu", CUDA: "cuda:0"}
FATAL = 4  # severity of log lines; errors are raised as exceptions and need no line
_Job: TypeAlias = tuple[
    Callable[[], list[NDArray[np.float32]]], Future[list[NDArray[np.float32]]]
]


class OnnxRuntime(OwnRuntime):
    """A session on `model.onnx` of a bundle, on the CPU."""

    setting = "onnxruntime-cpu"
    title = "ONNX Runtime"
    extra = "cpu"
    needs_gpu = False
    _provider = CPU

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Load *bundle*, on one thread per core unless *settings* say how many."""
        onnxruntime = import_onnxruntime()
        manifest = bundle.manifest

        if self._provider != CPU and self._provider in onnxruntime.get_available_providers():
            load_cuda_libraries(onnxruntime)  # without the provider, `_open_session` raises
            # For messages of the CUDA provider; sessions have their own.
            onnxruntime.set_default_logger_severity(FATAL)

        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.device = DEVICES[self._provider]
        self.largest_batch = manifest.batch.maximum
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]

        threads = settings.threads or usable_cores()
        self._session = _open_session(onnxruntime, bundle, threads, self._provider)
        if self._provider == CPU and manifest.precision == "int8" and lacks_vnni():
            log.info("%s: %s", bundle.name, SLOW_INT8)

    @staticmethod
    def is_set_up() -> bool:
        """Tell whether onnxruntime is installed."""
        return find_spec("onnxruntime") is not None

    @classmethod
    def reason_for_auto(cls, bundle: Bundle, settings: Settings) -> str | None:  # noqa: ARG003
        """Return that there is no other: `auto` asks this runtime last."""
        return "ONNX Runtime has no CUDA here"

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        values = self._session.run(self._outputs, {self._input: images})
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """Release the session."""
        self._session = None


class CudaOnnxRuntime(OnnxRuntime):
    """Sessions on a GPU, an `OverlappingRuntime`.

    A thread runs the batches, because `InferenceSession.run` waits for the GPU; meanwhile the
    next one is prepared. A session plans its convolutions anew whenever the batch size changes,
    which takes up to hundreds of times as long as the batch (docs/benchmarks/gpu.md). Batches
    are therefore padded to `padded_sizes`, and a graph with convolutions gets a session for
    each of these sizes when it first occurs.
    """

    setting = "onnxruntime-cuda"
    title = "ONNX Runtime with CUDA"
    extra = "gpu"
    needs_gpu = True
    _provider = CUDA

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        super().__init__(bundle, settings)
        self._bundle_name = bundle.name
        # Keeps the graph in memory, for the sessions of other sizes.
        self._open_another = partial(
            _open_session,
            import_onnxruntime(),
            bundle,
            settings.threads or usable_cores(),
            self._provider,
        )

        # A session makes plans for the size of its batches if it has convolutions.
        self._needs_session_per_size = any(
            "Conv" in operator for operator in _count_operators(self._session)
        )

        # The sessions by batch size; the first one takes batches of one.
        self._sessions = {1: self._session}
        self._buffers: list[NDArray[np.uint8]] = []  # for batches, as many as were in flight

        # A thread runs the batches, so that the next one can be made meanwhile.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._end_thread = weakref.finalize(self, self._jobs.put, None)
        # A daemon, unlike the threads of an executor: a device that hangs must not delay the
        # exit.
        self._thread = Thread(
            target=_run_jobs, args=(self._jobs,), name="onnxruntime", daemon=True
        )
        self._thread.start()

    @staticmethod
    def is_set_up() -> bool:
        """Tell whether the installed onnxruntime supports CUDA."""
        try:
            return CUDA in import_onnxruntime().get_available_providers()
        except RuntimeUnavailableError:
            return False

    @staticmethod
    def precisions() -> set[str]:
        """Return those without int8, which onnxruntime computes on CUDA in float32."""
        return {"fp32", "fp16"}

    @classmethod
    def reason_for_auto(cls, bundle: Bundle, settings: Settings) -> str | None:  # noqa: ARG003
        """Return that CUDA is there and no engine; raises for int8, which only a user may want in float32."""
        if not cls.is_set_up():
            return None

        if bundle.manifest.precision not in cls.precisions():
            raise RuntimeUnavailableError(
                f"{bundle.path}: onnxruntime computes int8 on CUDA in float32; export the checkpoint in "
                "precision fp16, or build a TensorRT engine (sopdeploy engine)",
                remedies={"runtime": cls.setting},
            )

        return "the bundle has no TensorRT engine that can be used here"

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        return self.begin(list(images))()

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); return a function that waits for *names*, by default all."""
        # Choose the size of the batch, up to which it is padded.
        names = self._outputs if names is None else list(names)
        count = len(images)
        large_enough = [size for size in padded_sizes(self.largest_batch) if size >= count]
        # A batch that is too large is not padded, and may fail.
        size = min(large_enough, default=count)

        # Memory that the system gives for each batch anew would cost more time than the copy of
        # the images.
        if self._buffers and size <= len(self._buffers[-1]):
            buffer = self._buffers.pop()
        else:
            buffer = np.empty((max(size, self.largest_batch), *images[0].shape), np.uint8)

        np.stack(images, out=buffer[:count])
        buffer[count:size] = 0

        # Let the thread run it.
        future: Future[list[NDArray[np.float32]]] = Future()  # of an array for each name
        run = partial(self._session_for(size).run, names, {self._input: buffer[:size]})
        self._jobs.put((run, future))

        def wait() -> dict[str, NDArray[np.float32]]:
            values = future.result()
            self._buffers.append(buffer)
            return {name: value[:count] for name, value in zip(names, values, strict=True)}

        return wait

    def close(self) -> None:
        """End the thread and release the sessions."""
        self._end_thread()
        self._thread.join()
        self._sessions.clear()
        super().close()

    def _session_for(self, size: int) -> Any:
        """Return the session for batches of *size*, opened at first use.

        This is the first session for a graph without convolutions and for sizes beyond
        `largest_batch`, and if memory is short.
        """
        if size > self.largest_batch or not self._needs_session_per_size:
            return self._session

        if size not in self._sessions:
            try:
                self._sessions[size] = self._open_another(like=self._session)
            except RuntimeUnavailableError as error:
                if not is_out_of_memory(error):
                    raise
                log.warning(
                    "%s: no memory to keep the plans for batches of %d", self._bundle_name, size
                )
                self._sessions[size] = self._session

        return self._sessions[size]


def _run_jobs(jobs: "SimpleQueue[_Job | None]") -> None:
    """Run the batches in *jobs* until None is queued."""
    while (job := jobs.get()) is not None:
        run, future = job
        try:
            future.set_result(run())
        except Exception as error:  # raised where the outputs are due
            future.set_exception(error)

        # The idle thread must not keep a session or the memory of a batch alive
        del (job, run, future)


def import_onnxruntime() -> Any:
    """Import onnxruntime; raise `RuntimeUnavailableError` if it is not installed."""
    return import_optional("onnxruntime", "onnxruntime", ".[cpu]", RuntimeUnavailableError)


def session_options(onnxruntime: Any, threads: int, provider: str) -> Any:
    """Return the options of a session on *provider*, with *threads* on the CPU."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL

    # Spinning threads would take the cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    if provider == CPU and lacks_vnni():  # sums of int8 products could saturate
        options.add_session_config_entry(*EXACT_INT8)
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # The optimizer of quantized graphs adds operators on int32 biases, which have no CUDA
        # kernel.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_graph(
    onnxruntime: Any, path: str, options: Any, provider: str, precision: str, like: Any = None
) -> Any:
    """Open the graph at *path*, in *precision*, on *provider*; *options* are `session_options`.

    On a GPU, a graph in fp16 gets the layout of tensor cores, NHWC, because cuDNN would
    otherwise transpose around convolutions. With this layout, onnxruntime also moves the
    operators that compute shapes to the GPU, and copies shapes between GPU and CPU in every
    run. A graph with more operators Shape than Conv, such as that of a transformer, therefore
    keeps the usual layout. With *like*, an earlier session of this graph, the layout is that of
    this session.
    """
    # With `enable_fallback`, onnxruntime runs on the CPU after errors.
    open_session = partial(onnxruntime.InferenceSession, path, options, enable_fallback=0)

    # Convolutions in half precision may be faster with channels last, but not if that adds
    # operators.
    if like is None:
        may_prefer_nhwc = provider == CUDA and precision == "fp16"
    else:
        may_prefer_nhwc = (
            PREFER_NHWC.items() <= like.get_provider_options().get(CUDA, {}).items()
        )

    if may_prefer_nhwc:
        session = open_session(providers=[(CUDA, CUDA_OPTIONS | PREFER_NHWC)])
        operators = _count_operators(session)
        if operators["Shape"] <= operators["Conv"]:
            return session
        del session  # its weights are on the GPU

    return open_session(providers=[(provider, CUDA_OPTIONS if provider == CUDA else {})])


def _count_operators(session: Any, provider: str | None = None) -> Counter[str]:
    """Count the operators of a GPU's *session* by their types, with *provider* only those that run there."""
    assigned = session.get_provider_graph_assignment_info()
    chosen = [subgraph for subgraph in assigned if provider in (None, subgraph.ep_name)]
    return Counter(node.op_type for subgraph in chosen for node in subgraph.get_nodes())


def operators_on_cpu(session: Any) -> list[str]:
    """Return the operators of a GPU's *session* that run on the CPU, except those that compute shapes.

    *session* was opened with `session_options`. Copying activations to the CPU is slower than a
    CPU alone.
    """
    return sorted(_count_operators(session, CPU).keys() - SHAPE_OPERATORS)


def _open_session(
    onnxruntime: Any, bundle: Bundle, threads: int, provider: str, like: Any = None
) -> Any:
    """Return a session on *provider* with the tensors of the manifest, or raise `RuntimeUnavailableError`.

    onnxruntime adds the CPU to a session on a GPU; only operators that compute shapes may run
    there. *like* is an earlier session of the graph, as in `open_graph`.
    """
    # The package here must have the provider.
    version = onnxruntime.__version__
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            f"onnxruntime {version} has no {provider} here; "
            f"{install_command('.[gpu]')} in an environment without the extra cpu"
        )

    # Open the graph.
    options = session_options(onnxruntime, threads, provider)
    if bundle.weights is not None:  # they must stay open until the session has its own
        weights = bundle.weights.view()
        options.add_external_initializers_from_files_in_memory(
            [GRAPH_DATA], [weights], [len(weights)]
        )
    try:
        session = open_graph(
            onnxruntime, bundle.onnx.path, options, provider, bundle.manifest.precision, like
        )
    except Exception as error:  # onnxruntime's errors share no base class
        reason = f"cannot load the graph: {readable_reason(error)}"
        if bundle.weights is None and "external data" in str(error).lower():
            reason = f"cannot load the graph: the bundle has no {GRAPH_DATA}; export it again"
        raise RuntimeUnavailableError(
            f"{bundle.path / GRAPH}: onnxruntime {version} {reason}"
        ) from error

    # ONNX Runtime falls back to the CPU on its own, for the graph or for some operators.
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{bundle.path / GRAPH}: asked for {provider}, onnxruntime chose {session.get_providers()}"
        )

    if provider != CPU and (operators := operators_on_cpu(session)):
        raise RuntimeUnavailableError(
            f"{bundle.path / GRAPH}: onnxruntime {version} runs {', '.join(operators)} on the CPU instead of "
            f"{DEVICES[provider]}; export the checkpoint again, for int8 with int8_for=tensorrt",
            remedies={"runtime": OnnxRuntime.setting},
        )

    # The graph must have the tensors of the manifest.
    declared = [tensor.name for tensor in (*bundle.manifest.inputs, *bundle.manifest.outputs)]
    tensors = [tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())]
    if tensors != declared:
        raise RuntimeUnavailableError(
            f"{bundle.path / GRAPH}: the graph has the tensors {tensors}, but the manifest says {declared}; "
            "export the bundle again"
        )

    return session
