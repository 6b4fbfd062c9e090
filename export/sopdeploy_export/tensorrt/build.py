"""From a linted graph to a plan, with the calls that TensorRT 8.6, 10 and 11 have in common.

What differs: 8.6 must be told that the batch is explicit and gets its precision by flags and layer by layer;
10 must be told that the network is strongly typed; 11 knows nothing else. Progress can be told from 10 on.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import deserialize, last_error, make_logger, version_of
from sopdeploy.tensorrt.profiles import Profile

Tell = Callable[[str], None]
Clock = Callable[[], float]
BEAT_SECONDS = 5.0
LEAST_SHARE = 0.02  # below it the time that is left would be a guess
MINUTE = 60


class Phases:
    """Nested phases and the share of the outermost that is done."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}  # phase: [done, of]
        self._parent: dict[str, str | None] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that *phase* of *steps* steps begins, inside of *parent*."""
        self._steps[phase] = [0, max(1, steps)]
        self._parent[phase] = parent

    def step(self, phase: str, done: int) -> None:
        """Note that step number *done* of *phase*, from 0, is complete."""
        if phase in self._steps:
            self._steps[phase][0] = done + 1

    def finish(self, phase: str) -> None:
        """Note that *phase* is over."""
        self._steps.pop(phase, None)
        self._parent.pop(phase, None)

    @property
    def innermost(self) -> str:
        """Return the name of the phase that began last."""
        return next(reversed(self._steps), "")

    @property
    def share(self) -> float:
        """Return how much of the outermost phase is done, 0 to 1."""
        outermost = [phase for phase, parent in self._parent.items() if parent not in self._parent]
        return self._share_of(outermost[0]) if outermost else 0.0

    def _share_of(self, phase: str) -> float:
        done, steps = self._steps[phase]
        inside = [self._share_of(child) for child, parent in self._parent.items() if parent == phase]
        return min(1.0, (done + max(inside, default=0.0)) / steps)


def line(elapsed: float, share: float | None, last_build: float | None, phase: str = "") -> str:
    """Return what the user reads: time so far, share, and an estimate of what is left."""
    text = f"building, {clock_time(elapsed)}"
    left = None
    if share is not None and share >= LEAST_SHARE:
        text += f", {share:.0%}"
        left = elapsed * (1 - share) / share
    elif last_build is not None:
        left = max(0.0, last_build - elapsed)
    if left is not None:
        text += f", about {clock_time(left)} left"
    return f"{text} ({phase})" if phase else text


def clock_time(seconds: float) -> str:
    """Return *seconds* as `2:05`."""
    return f"{int(seconds) // MINUTE}:{int(seconds) % MINUTE:02d}"


def make_monitor(trt: Any, tell: Tell, last_build: float | None, clock: Clock = time.monotonic) -> Any:
    """Return a progress monitor for TensorRT 10 and 11; control-C ends the build at its next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        """Tells every step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._begin = clock()
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Begin a phase."""
            self._phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Note a step; return whether the build is to go on."""
            try:
                self._phases.step(phase_name, step)
                share = self._phases.share
                tell(line(clock() - self._begin, share, last_build, self._phases.innermost))
            except KeyboardInterrupt:  # an exception must not cross TensorRT's own code
                self.stopped = True
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self._phases.finish(phase_name)

    return Monitor()


@contextmanager
def heartbeat(tell: Tell, last_build: float | None, seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Tell every few seconds that the build of TensorRT 8.6 goes on."""
    begin = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            tell(line(time.monotonic() - begin, None, last_build))

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
