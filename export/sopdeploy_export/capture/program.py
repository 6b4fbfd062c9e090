"""The network as it is deployed, captured as a torch.export program.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and
returns float32 outputs for any batch size of the bundle; a program that does not support the
whole range is rejected.
"""

import gc
import io
import linecache
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, SopdeployError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy_export.capture.deployed import EXPORT_EMBEDDING, EXPORT_LOGITS, Deployed
from sopdeploy_export.capture.symbolic_forms import SymbolicForms, simplify_operators
from sopdeploy_export.network import modules, tensors
from sopdeploy_export.program_hashes import (
    Fingerprint,
    ProgramRoot,
    fingerprint,
    program_root,
    value_root,
)
from sopdeploy_export.state import attributes_restored, object_id, recording_calls

NETWORK_PREFIX = "network."  # the attribute of `Deployed` that holds the network
# How torch.export says that code depends on the batch size.
BATCH_GUARD = re.compile(r"generated guard|to be a constant|marked \w+ as dynamic")
NO_GRAPH = "cannot be captured as one graph"
BY_SIZE = "its code treats some batch sizes differently, or fixes the size"
SIZE_REMEDY = (
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), a // b for int(a / b), and "
    "compute all images of a batch at once instead of in a loop"
)
HASHED_SIZE = re.compile(r"unhashable type.*SymInt")
SIZE_IS_KEY = (
    "its code uses the batch size as a key, as in cache[x.shape]: use the other sizes only"
)
DATA_DEPENDENT = re.compile(r"data-dependent expression")
DEPENDS_ON_VALUES = (
    "its code depends on values of the image, as `x[mask]` or `if` does: use torch.where"
)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The torch.export program of a network, for any batch size.

    Attributes:
        traced: It, as torch.export made it.
        program: It, functional; networks with equal programs share it.
        graph: Its graph before it was made functional, which runs.
        fingerprint: Of the program before it was made functional; None: it cannot be hashed.
    """

    traced: ExportedProgram
    program: ExportedProgram
    graph: fx.GraphModule
    fingerprint: Fingerprint | None

    @cached_property
    def root(self) -> ProgramRoot:
        """The root of the program; raises the errors of `program_root`.

        It is computed once: the program refers to the tensors of the network, not to copies.
        """
        return program_root(self.program)

    @property
    def needed(self) -> set[str]:
        """The names of the tensors that the outputs depend on, each by one of its names in the network."""
        return {name.removeprefix(NETWORK_PREFIX) for name in self.root.tensors}

    def computes_values_of(self, other: "Capture") -> bool:
        """Return whether the program computes the values of that of *other*, by `value_root`."""
        if self.program is other.program:
            return True
        return value_root(self.program).sha256 == value_root(other.program).sha256


class Captures:
    """The programs of the networks of an export, each captured once.

    A network is known by its identity and by the version and address of each of its tensors.
    """

    def __init__(self, preprocess: Preprocess, batch: BatchRange | None = None) -> None:
        self.preprocess = preprocess
        self.batch = batch or BatchRange()
        self._captures: dict[tuple[object, ...], Capture] = {}
        self._unread: set[tuple[object, ...]] = set()

    def of(self, network: nn.Module) -> Capture:
        """Return the program of *network*, captured unless it is known.

        Networks with the same operations and weights share a program, with the names of the one
        captured first. Raises `LoweringError` if the network cannot be captured.
        """
        key = self._key(network)
        if key not in self._captures:
            known = tuple(self._captures.values())
            self._captures[key] = capture(network, self.preprocess, self.batch, known)
        return self._captures[key]

    def share(self, network: nn.Module, capture: Capture) -> None:
        """Let *capture*, that of a network that computes the same, be that of *network*."""
        self._captures[self._key(network)] = capture

    def forget_roots(self) -> None:
        """Let roots be computed again: code of the user may have changed tensors of the programs."""
        for capture in self._captures.values():
            vars(capture).pop("root", None)

    def note_unread(self, network: nn.Module, parts: tuple[str, ...]) -> None:
        """Note that the program of *network* stays the same while its *parts* have random values."""
        self._unread.add((*self._key(network), parts))

    def are_unread(self, network: nn.Module, parts: tuple[str, ...]) -> bool:
        """Return whether this was noted."""
        return (*self._key(network), parts) in self._unread

    @staticmethod
    def _key(network: nn.Module) -> tuple[object, ...]:
        """Identify *network*, the outputs that are chosen, and its tensors."""
        chosen = (
            vars(network).get(attribute) for attribute in (EXPORT_LOGITS, EXPORT_EMBEDDING)
        )
        return (object_id(network), *chosen, *map(object_id, tensors(network).values()))


def capture(
    network: nn.Module,
    preprocess: Preprocess,
    batch: BatchRange,
    known: Sequence[Capture] = (),
) -> Capture:
    """Capture *network*, in eval mode, for the batch range.

    torch.export assumes that a dynamic dimension is at least 2; `prove.plain_run` compares the
    graph with runs of one image, too. If torch.export gives the same program as for one of
    *known*, its program is returned, because making a program functional takes longer than
    torch.export. Raises `LoweringError` if the network cannot be captured.
    """
    traced = export_program(network, preprocess, batch)
    graph = traced.module(check_guards=False)  # a copy, before writes are replaced
    of_network = fingerprint(traced)
    for other in known:
        if of_network is not None and other.fingerprint == of_network:
            return replace(other, traced=traced, graph=graph)
    return Capture(
        traced=traced,
        program=functionalize(traced, batch),
        graph=graph,
        fingerprint=of_network,
    )


def capture_any_batch(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange
) -> ExportedProgram:
    """Capture *network* for every batch size of the range, as one functional program.

    Raises the errors of `export_program` and `functionalize`.
    """
    return functionalize(export_program(network, preprocess, batch), batch)


def export_program(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange
) -> ExportedProgram:
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
        attributes_restored(deployed),  # such as caches, in which torch leaves empty tensors
        as_captured(deployed),
        answering_plain_run(),
        warnings.catch_warnings(
            action="ignore"
        ),  # torch warns about caches that forward assigns
    ):
        try:
            return torch.export.export(deployed, (images,), dynamic_shapes=shapes)
        except Exception as error:  # the network's own code, which can raise anything
            if not BATCH_GUARD.search(str(error)):
                raise
            with recording_fixed_sizes() as places, suppress(Exception):  # fails again
                torch.export.export(deployed, (images,), dynamic_shapes=shapes)
            where = f" in {places[0]}" if places else ""
            raise LoweringError(f"{NO_GRAPH}: {BY_SIZE}{where}; {SIZE_REMEDY}") from error


@contextmanager
def as_captured(network: nn.Module) -> Iterator[None]:
    """Let layers of *network* compute in the block what they compute in a graph (`ExportHints`)."""
    hinted = [module for _, module in modules(network) if isinstance(module, ExportHints)]
    before = [module.is_captured for module in hinted]
    for module in hinted:
        module.is_captured = True
    try:
        yield
    finally:
        for module, was_captured in zip(hinted, before, strict=True):
            module.is_captured = was_captured


@contextmanager
def answering_plain_run() -> Iterator[None]:
    """Answer code outside of torch, if it asks whether it is exported or compiled, that it is not.

    The graph is then that of a plain run. Code that imported the functions by their names, or
    asks in another way, still gets torch's answer; `prove.plain_run` finds what it does then.
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
def recording_fixed_sizes() -> Iterator[list[str]]:
    """Yield a list, and record in it the lines of code in the block that need sizes as numbers.

    Code of torch and of this package does not count.
    """
    places: list[str] = []
    needs_number = SymNode.guard_int.__code__
    compares = SymNode.guard_bool.__code__

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code not in (needs_number, compares):
            return
        caller = frame.f_back
        while caller is not None:
            module = str(caller.f_globals.get("__name__", ""))
            if module.partition(".")[0] not in ("torch", "sopdeploy", "sopdeploy_export"):
                file = caller.f_code.co_filename
                line = caller.f_lineno
                places.append(
                    f"{Path(file).name}:{line} ({linecache.getline(file, line).strip()})"
                )
                return
            # A comparison in a network comes through these modules alone. Those of torch's
            # operators, which come through others, fit every size.
            if frame.f_code is compares and module not in ("torch", SymNode.__module__):
                return
            caller = caller.f_back

    with recording_calls(record):
        yield places


def functionalize(program: ExportedProgram, batch: BatchRange) -> ExportedProgram:
    """Replace writes to operands, some forms of pooling, and the ellipsis of `einsum` in *program*.

    Raises `LoweringError` if torch cannot do this, or if some batch of 1 to `batch.maximum` is
    not accepted.
    """
    with capturing():
        simplify_operators(program)
        program = program.run_decompositions({})
    if batch.maximum == 1:
        return program
    name = program.graph_signature.user_inputs[0]
    dimension = (
        next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[0]
    )
    if isinstance(dimension, int):
        raise LoweringError(
            f"the network fixes the batch size to {dimension}; it must accept every size"
        )
    # torch.export narrows the range that it is asked for, 1 to `batch.maximum`, if code
    # requires it.
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; its code depends on the batch size"
        )
    return program


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Switch the garbage collector off: it would visit all nodes of a graph again and again.

    This takes a tenth of the time of a capture or a conversion.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def capturing() -> Iterator[None]:
    """Run a step of the capture; raise `LoweringError` with the first line of torch's message if it fails."""
    try:
        with garbage_kept(), torch.no_grad():
            yield
    except SopdeployError:
        raise
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        causes = (error, error.__cause__, error.__context__)
        text = "\n".join(str(cause) for cause in causes if cause is not None)
        if BATCH_GUARD.search(text):
            problem = f"{BY_SIZE}; {SIZE_REMEDY}"
        elif HASHED_SIZE.search(text):
            problem = SIZE_IS_KEY
        elif DATA_DEPENDENT.search(text):
            problem = DEPENDS_ON_VALUES
        else:
            problem = first_line(error)
        raise LoweringError(f"{NO_GRAPH}: {problem}") from error
