"""The network as it is deployed, captured as a torch.export program.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and
returns float32 outputs for any batch size of the bundle; a program that does not support the
whole range is rejected.
"""

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.sym_node import SymNode

from sopdeploy.base.environment import garbage_kept
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy_export.capture.buffers import create_buffers
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.capture.failures import (
    BY_SIZE,
    NO_GRAPH,
    no_graph,
)
from sopdeploy_export.capture.symbolic_forms import SymbolicForms, simplify_operators
from sopdeploy_export.network import at_line, attributes_restored, is_network_code, modules
from sopdeploy_export.program_hashes import CHECK_OF_TYPE, nodes_before

NETWORK_PREFIX = "network."  # the attribute of `Deployed` that holds the network


class Trace(NamedTuple):
    """What torch.export makes of a network.

    `program` is for any batch size; `functionalize` changes it in place. `created` names the
    buffers that a first run of the network creates or replaces. The program has them; the
    network itself is unchanged. `read_names` are the parameters and buffers that code of the network
    read as Python numbers, so that their values are in the program. `unregistered` is a trainable tensor
    that its code used and that none of its modules registers, if there is one.
    """

    program: ExportedProgram
    created: tuple[str, ...]
    read_names: frozenset[str]
    unregistered: Tensor | None


def trace(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> Trace:
    """Run torch.export on *network*, in eval mode, for all sizes of *batch*; *network* is unchanged afterwards.

    torch.export assumes that a dynamic dimension is at least 2; `prove.plain_run` compares the
    graph with runs of one image, too. Raises `LoweringError` if the network cannot be captured.
    """
    with attributes_restored(network):
        # Capture it as it is, which succeeds for most networks. If it writes to a buffer or fails,
        # the reason can be that its first run creates buffers.
        failure: LoweringError | None = None
        try:
            traced = export_program(network, preprocess, batch)
            specs = traced.program.graph_signature.output_specs
            if all(spec.kind != OutputKind.BUFFER_MUTATION for spec in specs):
                return traced
        except LoweringError as error:
            failure = error

        # Create them, and capture what the network does in its second run.
        created = create_buffers(network, preprocess)
        if created:
            return export_program(network, preprocess, batch)._replace(created=created)
        if failure is not None:
            raise failure
        # It writes to a stored buffer, which `program_root` refuses.
        return traced


def capture_any_batch(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange
) -> ExportedProgram:
    """Capture *network* for all batch sizes of *batch*, as one functional program.

    Raises the errors of `trace` and `functionalize`.
    """
    return functionalize(trace(network, preprocess, batch).program, batch)


def export_program(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> Trace:
    """Run torch.export on *network* for all batch sizes of *batch*; *network* is unchanged afterwards.

    Raises the `LoweringError` of `capturing`, which says what failed, where, and what to do.
    """
    deployed = Deployed(network, preprocess).eval()
    size = min(2, batch.maximum)  # torch.export makes a dimension of size 1 constant
    images = torch.zeros(size, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    shapes = None if size == 1 else ({0: Dim("batch", min=1, max=batch.maximum)},)

    def run_export() -> ExportedProgram:
        return torch.export.export(deployed, (images,), dynamic_shapes=shapes)

    with (
        capturing(),  # raises the `LoweringError`
        SymbolicForms(deployed) as forms,  # replaces functions that fit one batch size only
        as_captured(deployed),  # layers may use operators that are faster in a runtime
        answering_plain_run(),  # code that asks whether it is exported gets the answer no
        attributes_restored(deployed),  # such as caches, in which torch leaves empty tensors
        redirect_stderr(io.StringIO()),  # torch prints part of the graph on failure
        warnings.catch_warnings(action="ignore"),  # of torch, about caches
    ):
        try:
            program = run_export()
            names = (name.removeprefix(NETWORK_PREFIX) for name in forms.read_names)
            return Trace(program, (), frozenset(names), forms.unregistered)
        except Exception as error:  # the network's own code, which can raise anything
            match = BY_SIZE.words.search(str(error))
            if match is None:
                raise

            # Run it again, only to see which line needs the batch size as a number.
            with recording_fixed_sizes() as places, suppress(Exception):
                run_export()
            where = places[0] if places else ""
            raise LoweringError(f"{NO_GRAPH}: {BY_SIZE.describe(match, where)}") from error


@contextmanager
def as_captured(network: nn.Module) -> Iterator[None]:
    """Tell the layers of *network* in the block that they are captured (`ExportHints.is_captured`)."""
    layers = [module for _, module in modules(network) if isinstance(module, ExportHints)]
    before = [layer.is_captured for layer in layers]

    for layer in layers:
        layer.is_captured = True
    try:
        yield
    finally:
        for layer, was_captured in zip(layers, before, strict=True):
            layer.is_captured = was_captured


@contextmanager
def answering_plain_run() -> Iterator[None]:
    """Answer no in the block if code outside of torch asks whether it is exported or compiled.

    The graph is then that of a plain run. The functions that the code asks are replaced for the
    whole process. Code that imported them by their names, or asks in another way, still gets
    torch's answer; `prove.plain_run` finds what it does then.
    """
    functions = {
        name: getattr(torch.compiler, name) for name in ("is_exporting", "is_compiling")
    }

    def answer_outside(function: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            module = str(sys._getframe(1).f_globals.get("__name__", ""))
            return module.partition(".")[0] == "torch" and function()

        return answer

    for name, function in functions.items():
        setattr(torch.compiler, name, answer_outside(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(torch.compiler, name, function)


@contextmanager
def recording_calls(record: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Pass the calls of the block to *record*, as `sys.setprofile` does, instead of to an active profiler."""
    previous: Any = sys.getprofile()
    sys.setprofile(record)
    try:
        yield
    finally:
        if callable(previous) or previous is None:
            sys.setprofile(previous)
        else:  # cProfile's object, which is not a function
            sys.setprofile(None)
            previous.enable()


@contextmanager
def recording_fixed_sizes() -> Iterator[list[str]]:
    """Yield a list, which gets the lines of code in the block that need sizes as numbers.

    Code of torch and of this project does not count.
    """
    places: list[str] = []
    # torch calls these for a symbolic size: for its number, and for the result of a comparison.
    needs_number = SymNode.guard_int.__code__
    compares = SymNode.guard_bool.__code__

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code not in (needs_number, compares):
            return

        # The line is in the nearest caller that is code of the network.
        caller = frame.f_back
        while caller is not None:
            module = str(caller.f_globals.get("__name__", ""))
            if is_network_code(caller.f_code.co_filename):
                places.append(at_line(caller.f_code.co_filename, caller.f_lineno))
                return

            # If the network's own code compares sizes, only `torch` and the module of `SymNode`
            # lie between. Any other module belongs to an operator that itself compares sizes, and
            # is right for every size.
            if frame.f_code is compares and module not in ("torch", SymNode.__module__):
                return
            caller = caller.f_back

    with recording_calls(record):
        yield places


def functionalize(program: ExportedProgram, batch: BatchRange) -> ExportedProgram:
    """Return *program* in functional form: without writes to operands, and without what no output needs.

    First, `simplify_operators` changes *program* in place. Raises `LoweringError` if torch cannot
    do this, or if some batch of 1 to `batch.maximum` images is not accepted.
    """
    with capturing():
        simplify_operators(program)
        functional = program.run_decompositions({})
    remove_unneeded(functional)
    check_batch_sizes(functional, batch)
    return functional


def check_batch_sizes(program: ExportedProgram, batch: BatchRange) -> None:
    """Raise `LoweringError` unless *program* accepts every batch of 1 to `batch.maximum` images."""
    if batch.maximum == 1:  # it was captured for this size
        return

    # The batch size is the first dimension of the images; a number, if code fixes it.
    name = program.graph_signature.user_inputs[0]
    images = next(node for node in program.graph.nodes if node.name == name)
    dimension = images.meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(
            f"the network fixes the batch size to {dimension}; it must accept every size"
        )

    # torch.export narrows the range that it is asked for if code requires it.
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} "
            f"images only, not of 1 to {batch.maximum}; its code depends on the "
            "batch size"
        )


def remove_unneeded(program: ExportedProgram) -> None:
    """Remove what the outputs of *program* do not need, in place; operations with an effect stay.

    A check of the type of a value that no output needs has no effect, so it is removed.
    """
    graph = program.graph

    # Checks of the types of values that no output needs, which `eliminate_dead_code` would keep.
    needed = nodes_before(graph, graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node.target is CHECK_OF_TYPE and not needed.issuperset(node.all_input_nodes):
            graph.erase_node(node)

    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextmanager
def capturing() -> Iterator[None]:
    """Run a step of the capture in the block; raise `LoweringError` with the cause if it fails."""
    try:
        with garbage_kept(), torch.no_grad():
            yield
    except SopdeployError:
        raise
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        raise no_graph(error) from error
