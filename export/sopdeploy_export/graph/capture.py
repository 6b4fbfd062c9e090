"""Capture a network as a torch.export program.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and returns
float32 outputs for any batch size of the bundle; a program that does not support the whole range is rejected.
"""

import gc
import io
import linecache
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, SopdeployError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy_export.graph.deployed import Deployed
from sopdeploy_export.graph.forms import SymbolicForms, simplify_operators
from sopdeploy_export.program_hashes import Trace, are_equal_traces, trace_hash
from sopdeploy_export.state import (
    modules,
    preserved,
    recording_calls,
)

# How torch.export says that code depends on the batch size.
BATCH_GUARD = re.compile(r"generated guard|to be a constant|marked \w+ as dynamic")
NO_GRAPH = "cannot be captured as one graph"
BY_SIZE = "its code treats some batch sizes differently, or fixes the size"
SIZE_REMEDY = (
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), and compute all images "
    "of a batch at once instead of in a loop"
)
DATA_GUARD = re.compile(r"data-dependent expression")
BY_VALUE = "its code depends on values of the image, as `x[mask]` or `if` does: use torch.where"


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """The functional torch.export programs of one network: for the whole batch range and for a batch of one.

    `traces` are the hashes of both programs before they were made functional; None: it cannot be hashed.
    """

    any_batch: ExportedProgram
    batch_of_one: ExportedProgram
    traces: tuple[Trace | None, ...]


def capture(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange, known: Sequence[Captured] = ()
) -> Captured:
    """Capture *network*, in eval mode, for the batch range and for a batch of one.

    torch.export assumes that a dynamic dimension is at least 2, so only the second program shows code that
    handles a single image differently. If torch.export gives the same two programs as for one of *known*,
    this one is returned, because making programs functional takes longer than torch.export.
    Raises `LoweringError` if the network cannot be captured.
    """
    ranges = ranges_of(batch)
    traced = [trace(network, preprocess, one) for one in ranges]
    traces = tuple(map(trace_hash, traced))
    for captured in known:
        if are_equal_traces(captured.traces, traces):
            return captured
    programs = [functional(program, one) for program, one in zip(traced, ranges, strict=True)]
    return Captured(any_batch=programs[0], batch_of_one=programs[-1], traces=traces)  # equal if maximum is 1


def ranges_of(batch: BatchRange) -> list[BatchRange]:
    """List the ranges that a network is captured for: *batch*, and one image unless this is all of it."""
    return [batch] if batch.maximum == 1 else [batch, BatchRange(optimum=1, maximum=1)]


def capture_any_batch(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Capture *network* for every batch size of the range; raises the errors of `trace` and `functional`."""
    return functional(trace(network, preprocess, batch), batch)


def trace(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Run torch.export on *network* for every batch size of the range; *network* is unchanged afterwards.

    Raises `LoweringError` with the first line of torch's message.
    """
    deployed = Deployed(network, preprocess).eval()
    size = min(2, batch.maximum)  # torch.export makes a dimension of size 1 constant
    images = torch.zeros(size, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    shapes = None if size == 1 else ({0: Dim("batch", min=1, max=batch.maximum)},)
    with (
        capturing(),  # raises the `LoweringError`
        SymbolicForms(),  # replaces functions that fit one batch size only
        redirect_stderr(io.StringIO()),  # torch prints part of the graph on failure
        preserved(deployed),  # resets `is_captured`, and caches, where torch leaves tensors without values
        warnings.catch_warnings(action="ignore"),  # torch warns about caches that forward assigns
    ):
        for _, module in modules(deployed):
            if isinstance(module, ExportHints):
                module.is_captured = True
        try:
            return torch.export.export(deployed, (images,), dynamic_shapes=shapes)
        except Exception as error:  # the network's own code, which can raise anything
            if not BATCH_GUARD.search(str(error)):
                raise
            with fixed_sizes() as places, suppress(Exception):  # fails again
                torch.export.export(deployed, (images,), dynamic_shapes=shapes)
            where = f" in {places[0]}" if places else ""
            raise LoweringError(f"{NO_GRAPH}: {BY_SIZE}{where}; {SIZE_REMEDY}") from error


@contextmanager
def fixed_sizes() -> Iterator[list[str]]:
    """List the lines of code in the block, outside of torch and this package, that need sizes as numbers."""
    places: list[str] = []
    guards = (SymNode.guard_int.__code__, SymNode.guard_bool.__code__)

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code not in guards:
            return
        is_number, caller = frame.f_code is guards[0], frame.f_back
        while caller is not None:
            package = str(caller.f_globals.get("__name__", "")).partition(".")[0]
            if package not in ("torch", "sopdeploy", "sopdeploy_export"):
                break
            # Operators compare sizes, too, in ways that fit every size.
            if not is_number and str(caller.f_globals.get("__name__")) not in ("torch", SymNode.__module__):
                return
            caller = caller.f_back
        if caller is not None:
            file, line = caller.f_code.co_filename, caller.f_lineno
            code = linecache.getline(file, line).strip()
            places.append(f"{Path(file).name}:{line} ({code})")

    with recording_calls(record):
        yield places


def functional(program: ExportedProgram, batch: BatchRange) -> ExportedProgram:
    """Replace writes to operands, some forms of pooling, and the ellipsis of `einsum` in *program*.

    Raises `LoweringError` if torch cannot do this, or if some batch of 1 to `batch.maximum` is not accepted.
    """
    with capturing():
        simplify_operators(program)
        program = program.run_decompositions({})
    if batch.maximum == 1:
        return program
    name = program.graph_signature.user_inputs[0]
    dimension = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(f"the network fixes the batch size to {dimension}; it must accept every size")
    # torch.export narrows the range that `trace` asks for, 1 to `batch.maximum`, if code requires it.
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; its code depends on the batch size"
        )
    return program


@contextmanager
def capturing() -> Iterator[None]:
    """Run a step of the capture; raise `LoweringError` with the first line of torch's message if it fails.

    The garbage collector is off, because it would visit all nodes of a graph again and again, which takes a
    tenth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    except SopdeployError:
        raise
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        raise LoweringError(f"{NO_GRAPH}: {_capture_problem(error)}") from error
    finally:
        if was_enabled:
            gc.enable()


def _capture_problem(error: Exception) -> str:
    """Describe an *error* of torch.export."""
    text = "\n".join(str(cause) for cause in (error, error.__cause__, error.__context__) if cause is not None)
    if BATCH_GUARD.search(text):
        return f"{BY_SIZE}; {SIZE_REMEDY}"
    return BY_VALUE if DATA_GUARD.search(text) else first_line(error)
