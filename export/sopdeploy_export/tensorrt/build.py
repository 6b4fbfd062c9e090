"""Build a TensorRT plan from a linted ONNX graph, with TensorRT 8.6, 10 or 11.

TensorRT 8.6 needs an explicit batch flag and takes the precision from builder flags and layer settings;
TensorRT 10 needs a strongly typed network; TensorRT 11 has only strongly typed networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import create, deserialize, last_error, make_logger, version_of
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy_export.tensorrt.progress import (
    Interrupt,
    Report,
    heartbeat,
    interrupts_recorded,
    make_monitor,
)

STRONGLY_TYPED_SINCE = 10
COMPUTE_LAYERS = (
    "ACTIVATION",
    "CONVOLUTION",
    "ELEMENTWISE",
    "MATRIX_MULTIPLY",
    "POOLING",
    "REDUCE",
    "SCALE",
    "SOFTMAX",
    "UNARY",
)


@dataclass(frozen=True)
class BuildRequest:
    """The inputs of one build.

    *workspace* is in bytes; *last_build* is the duration of an earlier build in seconds, for the progress.
    """

    onnx: bytes
    profiles: tuple[Profile, ...]
    precision: str
    level: int = 3
    workspace: int = 1 << 32
    timing_cache: bytes = b""
    last_build: float | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """The outputs of one build: the plan and the timing cache."""

    plan: bytes
    timing_cache: bytes


def build(trt: Any, request: BuildRequest, report: Report) -> BuiltPlan:
    """Build a plan for *request*; *report* receives the progress.

    Raises `EngineError` with TensorRT's own message if the graph cannot be parsed or built, and
    `KeyboardInterrupt` after Ctrl-C.
    """
    with interrupts_recorded() as interrupt:
        return _build(trt, request, report, interrupt)


def _build(trt: Any, request: BuildRequest, report: Report, interrupt: Interrupt) -> BuiltPlan:
    logger = make_logger(trt)
    builder = create(trt, "Builder", logger)
    network = builder.create_network(network_flags(trt))
    _parse(trt, network, request.onnx, logger)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    config.builder_optimization_level = request.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default in every release
    if version_of(trt)[0] < STRONGLY_TYPED_SINCE:
        set_layer_precisions(trt, network, config, request.precision)
    _add_profiles(builder, config, network, request.profiles)
    set_timing_cache(config, request.timing_cache)
    memory = _serialize(trt, builder, network, config, request, report, interrupt)
    if memory is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build the engine: {last_error(logger)}")
    timings = config.get_timing_cache()
    return BuiltPlan(
        plan=bytes(memory), timing_cache=bytes(timings.serialize()) if timings is not None else b""
    )


def network_flags(trt: Any) -> int:
    """Compute the network creation flags: explicit batch in 8.6, strongly typed since 10."""
    flags = trt.NetworkDefinitionCreationFlag
    if version_of(trt)[0] < STRONGLY_TYPED_SINCE:
        return 1 << int(flags.EXPLICIT_BATCH)
    return 1 << int(flags.STRONGLY_TYPED)


def set_timing_cache(config: Any, content: bytes) -> None:
    """Load the timing cache *content* into *config*; use an empty cache if TensorRT rejects it."""
    timings = config.create_timing_cache(content)
    if timings is None or not config.set_timing_cache(timings, False):  # damaged, or from another machine
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _parse(trt: Any, network: Any, graph: bytes, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    if version_of(trt)[0] < STRONGLY_TYPED_SINCE and hasattr(trt, "OnnxParserFlag"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # the default is a plugin that needs cuDNN 8
    if parser.parse(graph):
        return
    reason = last_error(logger)
    if parser.num_errors:
        error = parser.get_error(0)
        node = f"node {error.node()}"
        if hasattr(error, "node_operator"):  # since 10
            node = f"{node} ({error.node_operator()} {error.node_name()})"
        reason = f"{node}: {' '.join(error.desc().split())}"
    raise EngineError(f"TensorRT {trt.__version__} cannot read the graph: {reason}")


def set_layer_precisions(trt: Any, network: Any, config: Any, precision: str) -> None:
    """Set the types of layers for TensorRT 8.6, which is weakly typed and may remove casts of the graph."""
    flags = trt.BuilderFlag
    if precision == "fp32":
        return
    config.set_flag(flags.INT8 if precision == "int8" else flags.FP16)
    config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
    if precision == "int8":
        return  # the Q and DQ operators define the precision
    compute_layers = {getattr(trt.LayerType, name) for name in COMPUTE_LAYERS}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        dtype = layer.get_output(0).dtype
        if layer.type in compute_layers and dtype in {trt.DataType.FLOAT, trt.DataType.HALF}:
            layer.precision = dtype
            layer.set_output_type(0, dtype)


def _add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for batches in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            rest = tuple(tensor.shape)[1:]
            sizes = (batches.minimum, batches.optimum, batches.maximum)
            profile.set_shape(tensor.name, *((size, *rest) for size in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT rejects the optimization profile for batches of {batches}")


def _serialize(
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    request: BuildRequest,
    report: Report,
    interrupt: Interrupt,
) -> Any:
    if not hasattr(trt, "IProgressMonitor"):
        with heartbeat(report, request.last_build):
            return builder.build_serialized_network(network, config)
    monitor = make_monitor(trt, report, request.last_build, interrupt)
    config.progress_monitor = monitor
    return builder.build_serialized_network(network, config)


def inspect(trt: Any, plan: bytes) -> str:
    """Read the layer information of the engine in *plan* as JSON; needs a GPU."""
    _runtime, engine = deserialize(trt, plan, make_logger(trt))
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
