"""Plain run: a run of the network performs the operators of its captured graph, on the same operands.

The network runs on a few images, and so does its graph. `dataflow` records how each of the two
runs made its outputs. Equal records show equal computations for images and weights of any values,
unless the code of the network asks for values; where it does, the run reports it.

Both runs are without the fast path of `nn.MultiheadAttention`, which no graph takes, with the
forms of `capture.symbolic_forms`, and with those that layers of this package take in a graph.

Not seen: values that code reads below torch's functions or in another thread, a kernel in C++
that computes something else for other images, and code that counts its calls outside of tensors
and does something else much later.

Refused: code that does something else while it is captured
(`test_a_plain_run_that_does_something_else_is_refused_with_its_place`).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sopdeploy.errors import CertificateError, SopdeployError, first_line, shorten
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.capture.program import NETWORK_PREFIX, as_captured
from sopdeploy_export.capture.symbolic_forms import SymbolicForms
from sopdeploy_export.network import tensors
from sopdeploy_export.program_hashes import are_equal
from sopdeploy_export.prove.dataflow import (
    Dataflow,
    FunctionReads,
    GraphRun,
    Remains,
    address,
    other_values,
)
from sopdeploy_export.state import STATELESS, attributes_restored

STATEMENT = (
    "For 1, 2 and 3 images, a plain run of the trained network, alone and again, performs the "
    "operators of its graph on the same operands, and no value or size that depends on an image "
    "reaches its code."
)
LARGEST = 3  # of the batches from 1 on that run: code can treat one image in its own way
REPEATED = 2  # the batch that runs twice
USE_TENSORS = "use operators of torch on all images, such as torch.where"


@dataclass(frozen=True, slots=True)
class Run:
    """A recorded run: its dataflow, what its outputs are known by, and their values."""

    flow: Dataflow
    results: tuple[str, ...]
    values: tuple[Tensor, ...]

    def first_other(self, other: "Run") -> str:
        """Describe the first operator behind the outputs that *other* does not run on these operands."""
        for result in self.results:
            for code, operator in self.flow.behind(result).items():
                if code not in other.flow.operators:
                    return str(operator)
        return "nothing else"


class Recorder:
    """Records runs of *deployed* and of its *graph* on the first of uint8 *images* (N, H, W, 3)."""

    def __init__(self, deployed: Deployed, graph: fx.GraphModule, images: Tensor) -> None:
        self._deployed = deployed
        self._graph = GraphRun(graph, deployed)
        self._images = images
        self._remains = Remains()

    def run_network(self, size: int) -> Run:
        """Record a plain run."""
        images = self._images[:size].clone()
        flow = Dataflow(self._deployed, images, self._remains)
        with flow, FunctionReads(flow), SymbolicForms():
            outputs = self._deployed(images)
        results = tuple(map(flow.known_by, outputs))
        values = tuple(output.clone() for output in outputs)

        # What is still held when this run's own names are gone is left for later ones.
        del outputs, images
        flow.leave()
        return Run(flow, results, values)

    def run_graph(self, size: int) -> Run:
        """Record a run of the graph."""
        images = self._images[:size].clone()
        flow = Dataflow(self._deployed, images, self._remains)
        self._graph.flow = flow
        with flow:
            outputs = self._graph.run(images)
        return Run(flow, tuple(map(flow.known_by, outputs)), tuple(outputs))


@torch.no_grad()
def prove_plain_run(
    deployed: Deployed,
    graph: fx.GraphModule,
    images: Tensor,
    removed: Sequence[str] = (),
    largest_batch: int = LARGEST,
) -> None:
    """Prove that *deployed* performs what *graph*, captured from it, does on uint8 *images* (N, H, W, 3).

    *removed* are the parts that only training uses: while they hold other values, the network
    performs the same. Raises `CertificateError` with the operator, module and line that differ.
    """
    recorder = Recorder(deployed, graph, images[-LARGEST:])
    repeated = min(REPEATED, largest_batch)
    with attributes_restored(deployed), as_captured(deployed), without_fast_path():
        try:
            # The first run makes what the network keeps for later ones, such as tables.
            first = recorder.run_network(repeated)
            check_run(first)
            for size in range(1, min(LARGEST, largest_batch) + 1):
                plain = recorder.run_network(size)
                check_run(plain)
                captured = recorder.run_graph(size)
                if plain.results != captured.results:
                    raise CertificateError(
                        f"with {size} image{'s' * (size > 1)}, a plain run of the network does "
                        f"something else than its graph: the network runs {plain.first_other(captured)}, "
                        f"the graph {captured.first_other(plain)}; its code must depend on neither the "
                        "batch size nor being exported, nor write outside of torch's operators"
                    )
                if size == repeated:
                    check_repeated(first, plain)
            if removed:
                check_removed(recorder, deployed, removed, repeated)
        except SopdeployError:
            raise
        except Exception as error:  # the network's own code
            raise CertificateError(
                f"a plain run of the network fails: {first_line(error)}"
            ) from error


def check_run(run: Run) -> None:
    """Raise `CertificateError` if values of images reach Python, or if the run leaves traces."""
    flow = run.flow
    if flow.failures:
        raise CertificateError(
            f"a plain run of the network cannot be followed: {flow.failures[0]}; use operators of torch on "
            "dense tensors"
        )
    if flow.reads:
        raise CertificateError(
            f"the network's code reads values or sizes that depend on the images: {flow.reads[0]}; "
            f"{USE_TENSORS}"
        )
    if flow.hidden_writes:
        raise CertificateError(
            f"{flow.hidden_writes[0]} writes to an operand, unlike its schema; declare what it mutates"
        )
    if flow.kept_writes:
        raise CertificateError(
            f"{flow.kept_writes[0]} writes to memory that outlives the run; {STATELESS}"
        )
    if flow.reused:
        raise CertificateError(
            f"{flow.reused[0]} uses what an earlier run computed from its images; {STATELESS}"
        )
    needed = [operator for result in run.results for operator in flow.behind(result).values()]
    if draws := next((operator for operator in needed if operator.is_random), None):
        raise CertificateError(f"the outputs depend on random numbers, of {draws}; remove them")


def check_repeated(first: Run, again: Run) -> None:
    """Raise `CertificateError` unless a second run performs, and returns, what the *first* one did."""
    if first.results != again.results:
        raise CertificateError(
            f"a second run of the network does something else: the first one runs "
            f"{first.first_other(again)}, the second {again.first_other(first)}; {STATELESS}"
        )
    if not all(map(are_equal, first.values, again.values)):
        raise CertificateError(f"a second run of the network gives other outputs; {STATELESS}")


def check_removed(
    recorder: Recorder, deployed: Deployed, removed: Sequence[str], size: int
) -> None:
    """Raise `CertificateError` if the run changes while *removed* parts hold other values."""
    parts = [f"{NETWORK_PREFIX}{part}" for part in removed]
    stored = tensors(deployed)
    kept = {address(tensor) for name, tensor in stored.items() if not is_in(name, *parts)}
    values = [
        tensor
        for name, tensor in stored.items()
        if is_in(name, *parts) and address(tensor) not in kept
    ]
    expected = recorder.run_network(size)

    # Nothing of a removed part is behind the outputs.
    for result in expected.results:
        for operator in expected.flow.behind(result).values():
            names = [name for name in operator.operands if is_in(name, *parts)]
            if names or is_in(operator.module, *removed):
                cause = names[0].removeprefix(NETWORK_PREFIX) if names else operator.module
                raise CertificateError(
                    f"the outputs depend on {cause}, which is removed: {operator}; keep it"
                )

    # Nor does the run ask for what a removed part holds.
    with other_values(values):
        changed = recorder.run_network(size)
    if changed.results != expected.results:
        raise CertificateError(
            f"while {shorten(list(removed))} has other values, the network runs "
            f"{changed.first_other(expected)} instead of {expected.first_other(changed)}; "
            "the outputs must not depend on what is removed"
        )


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch the fast path of `nn.MultiheadAttention` off, and warnings of the network's code."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
