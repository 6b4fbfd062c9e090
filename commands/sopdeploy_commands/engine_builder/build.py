"""Build a TensorRT plan from an ONNX graph as a strongly typed network: its types are the graph's.

TensorRT's own parser names the operators that it does not support.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sopdeploy.errors import EngineError, LoweringError
from sopdeploy_service.runtime.tensorrt_cache import Profile
from sopdeploy_service.runtime.tensorrt_session import create, last_error, reset_logger

Report = Callable[[str], None]
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def cast_images_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *model* for TensorRT: uint8 images become float32 before operators that move them or read their shape.

    TensorRT accepts uint8 only for network inputs. The result is the same, because casts
    commute with operators that only move values. The copy is unchanged if the images are not
    uint8, or are cast first already. Raises `LoweringError` if another operator reads uint8
    values.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    name = copied.graph.input[0].name
    if copied.graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return copied

    # Find the operators that read uint8 values: the images themselves, or moved ones.
    uint8_values = {name}  # names
    readers = set()  # types of operators
    for node in copied.graph.node:  # in topological order
        if uint8_values.isdisjoint(node.input):
            continue
        readers.add(node.op_type)
        if node.op_type in MOVES:
            uint8_values.update(node.output)
        elif node.op_type not in ("Cast", "Shape"):  # whose results are not uint8
            raise LoweringError(
                f"{name}: {node.op_type} uses unsigned bytes, which TensorRT can only cast"
            )

    if readers <= {"Cast"}:  # the graph casts the images first
        return copied

    # Cast the images once, at the input, and let all their readers read float32.
    cast = helper.make_node(
        "Cast", [name], [f"{name}_float32"], f"{name}_cast", to=TensorProto.FLOAT
    )
    for node in copied.graph.node:
        node.input[:] = [
            cast.output[0] if operand == name else operand for operand in node.input
        ]

    copied.graph.node.insert(0, cast)
    del copied.graph.value_info[:]  # has the types of moved uint8 values
    return copied


def parse_and_build(
    trt: Any,
    graph: bytes,
    profiles: Sequence[Profile],
    workspace: int,
    report: Report,
    weights: Mapping[str, memoryview] | None = None,
) -> bytes:
    """Build TensorRT's plan of *graph* for *profiles* in *workspace* bytes; *report* receives the progress.

    *weights* are those that are not in *graph*, by their names. Raises `EngineError` with TensorRT's own
    message if the graph cannot be parsed or built, and `KeyboardInterrupt` after Ctrl-C.
    """
    # The parser reads the graph and its weights into TensorRT's network.
    logger = reset_logger(trt)
    builder = create(trt, "Builder", logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)

    if not _parse(parser, graph, weights or {}):
        reason = _parser_error(parser) or last_error(logger)
        raise EngineError(f"TensorRT {trt.__version__} cannot read the graph: {reason}")

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default

    for batches in profiles:
        _add_profile(builder, config, network, batches)

    # The build takes minutes: it reports its progress, and Ctrl-C ends it.
    with interrupts_recorded() as interrupt:
        monitor = make_monitor(trt, report, interrupt)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT {trt.__version__} cannot build the engine: {last_error(logger)}"
        )
    return bytes(plan)


def _parse(parser: Any, graph: bytes, weights: Mapping[str, memoryview]) -> bool:
    """Read *graph* and the *weights* outside of it, which must stay in memory until it is built; tell success."""
    is_parsed = parser.load_model_proto(graph)
    for name, content in weights.items():
        values = np.frombuffer(content, np.uint8)
        is_parsed = is_parsed and parser.load_initializer(name, values.ctypes.data, len(values))
    return is_parsed and parser.parse_model_proto()


def _add_profile(builder: Any, config: Any, network: Any, batches: Profile) -> None:
    """Add a range of batch sizes to *config*; only the first axis of an input is dynamic."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        sizes = (batches.minimum, batches.maximum, batches.maximum)  # tuned for the largest
        profile.set_shape(tensor.name, *((size, *rest) for size in sizes))

    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT rejects the optimization profile for batches of {batches}")


def _parser_error(parser: Any) -> str:
    """Return the first error of *parser* and its node; empty without one."""
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    node = f"node {error.node()} ({error.node_operator()} {error.node_name()})"
    return f"{node}: {' '.join(error.desc().split())}"


@contextmanager
def interrupts_recorded() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets while an engine is built; raise `KeyboardInterrupt` at the end only.

    Otherwise, it would be raised in a callback, whose caller is TensorRT's C++ code.
    """
    interrupt = threading.Event()
    # Other threads cannot set handlers; a handler of the caller stays.
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_replaced = (
        in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    if is_replaced:
        signal.signal(signal.SIGINT, lambda *_: interrupt.set())

    try:
        yield interrupt
    finally:
        if is_replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupt.is_set():
            raise KeyboardInterrupt


def make_monitor(trt: Any, report: Report, interrupt: threading.Event) -> Any:
    """Create TensorRT's progress monitor, which calls *report* and ends the build after an *interrupt*."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        """Report every step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._begin = time.monotonic()

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: int
        ) -> None:
            """Begin a phase."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Complete a step; False stops the build."""
            del step
            minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
            report(f"building, {minutes}:{seconds:02d} ({phase_name})")
            return not interrupt.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""

    return Monitor()
