"""From a linted graph to a plan, with the calls that TensorRT 8.6, 10 and 11 have in common.

What differs: 8.6 must be told that the batch is explicit and gets its precision by flags and layer by layer;
10 must be told that the network is strongly typed; 11 knows nothing else. Progress can be told from 10 on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sopdeploy.engines.binding import deserialize, last_error, make_logger, version_of
from sopdeploy.engines.profiles import Profile
from sopdeploy.errors import EngineError
from sopdeploy_export.engine_progress import Tell, heartbeat, make_monitor

TYPED_SINCE = 10
COMPUTING = (
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
    """What one build is given."""

    onnx: bytes
    profiles: tuple[Profile, ...]
    precision: str
    level: int = 3
    workspace: int = 1 << 32
    timing_cache: bytes = b""
    last_build: float | None = None  # seconds


@dataclass(frozen=True)
class Built:
    """What one build gave: the plan, what the inspector says of it, the timing cache."""

    plan: bytes
    information: str
    timing_cache: bytes


def build(trt: Any, request: BuildRequest, tell: Tell) -> Built:
    """Return a plan for *request*; *tell* hears how far it is.

    Raises `EngineError` with TensorRT's own words where it does not build.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(f"TensorRT {trt.__version__} gives no builder: {last_error(logger)}")
    network = builder.create_network(network_flags(trt))
    parse(trt, network, request.onnx, logger)
    config = builder.create_builder_config()
    configure(trt, config, request)
    if version_of(trt)[0] < TYPED_SINCE:
        ask_layer_by_layer(trt, network, config, request.precision)
    add_profiles(builder, config, network, request.profiles)
    use_timings(config, request.timing_cache)
    plan = bytes_or_none(serialize(trt, builder, network, config, request, tell))
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build the engine: {last_error(logger)}")
    timings = config.get_timing_cache()
    return Built(
        plan=plan,
        information=inspect(trt, plan, logger),
        timing_cache=bytes(timings.serialize()) if timings is not None else b"",
    )


def network_flags(trt: Any) -> int:
    """Return the flags of a network whose batch is explicit and whose types are the graph's."""
    flags = trt.NetworkDefinitionCreationFlag
    if version_of(trt)[0] < TYPED_SINCE:
        return 1 << int(flags.EXPLICIT_BATCH)
    return 1 << int(flags.STRONGLY_TYPED)


def parse(trt: Any, network: Any, graph: bytes, logger: Any) -> None:
    """Fill *network* from the ONNX bytes *graph*."""
    parser = trt.OnnxParser(network, logger)
    if version_of(trt)[0] < TYPED_SINCE and hasattr(trt, "OnnxParserFlag"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # else a plugin over cuDNN 8
    if parser.parse(graph):
        return
    errors = [
        f"node {parser.get_error(i).node()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)
    ]
    raise EngineError(
        f"TensorRT {trt.__version__} cannot read the graph: {errors[0] if errors else last_error(logger)}"
    )


def configure(trt: Any, config: Any, request: BuildRequest) -> None:
    """Set what every release knows: workspace, level, names for the inspector, and no TF32.

    TF32 is on by default in every release; a number that the graph calls fp32 is to be one.
    """
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    config.builder_optimization_level = request.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)


def use_timings(config: Any, content: bytes) -> None:
    """Give *config* the timings in *content*, or none where they are damaged or of another machine."""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def ask_layer_by_layer(trt: Any, network: Any, config: Any, precision: str) -> None:
    """Make the weakly typed TensorRT 8.6 keep the graph's types: its casts alone may be fused away."""
    flags = trt.BuilderFlag
    if precision == "fp32":
        return
    config.set_flag(flags.INT8 if precision == "int8" else flags.FP16)
    config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
    if precision == "int8":
        return  # the Q and DQ operators are the constraint
    computing = {getattr(trt.LayerType, name) for name in COMPUTING}
    floating = {trt.DataType.FLOAT, trt.DataType.HALF}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.get_output(0).dtype
        if layer.type in computing and kind in floating:
            layer.precision = kind
            layer.set_output_type(0, kind)


def add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    """Add one optimisation profile for each of *profiles*, over the batch of every input."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for wanted in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            rest = tuple(tensor.shape)[1:]
            sizes = ((size, *rest) for size in (wanted.minimum, wanted.optimum, wanted.maximum))
            profile.set_shape(tensor.name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT refuses the profile for batches of {wanted}")


def serialize(trt: Any, builder: Any, network: Any, config: Any, request: BuildRequest, tell: Tell) -> Any:
    """Return the plan as TensorRT's own memory, or `None`, and tell progress on the way."""
    if not hasattr(trt, "IProgressMonitor"):
        with heartbeat(tell, request.last_build):
            return builder.build_serialized_network(network, config)
    monitor = make_monitor(trt, tell, request.last_build)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    return plan


def bytes_or_none(memory: Any) -> bytes | None:
    """Return the bytes of TensorRT's *memory*, if there is any."""
    return None if memory is None else bytes(memory)


def inspect(trt: Any, plan: bytes, logger: Any) -> str:
    """Return what the inspector says of the engine in *plan*, as JSON."""
    _runtime, engine = deserialize(trt, plan, logger)
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
