"""Plain run: a run of the network performs the operators of its captured graph, on the same operands.

The network runs on a few images, and so does its graph. `dataflow` records how each of the two
runs made its outputs. Equal records show equal computations for images and weights of any values,
unless the code of the network asks for values; where it does, the run reports it. The values do
not matter, so the graph's run computes nothing that depends on an image: it takes the layouts of
such results from the plain run.

Both runs are without the fast path of `nn.MultiheadAttention`, which no graph takes, with the
forms of `capture.symbolic_forms`, and with those that layers of this package take in a graph.

Not seen: values that code reads below torch's functions or in another thread, a kernel in C++
that computes something else for other images, and code that counts its calls outside of tensors
and does something else much later.

Refused: code that does something else while it is captured
(`test_a_plain_run_that_does_something_else_is_refused_with_its_place`).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sopdeploy.errors import CertificateError, SopdeployError, amount, first_line
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import STATELESS, Deployed
from sopdeploy_export.capture.program import NETWORK_PREFIX, as_captured
from sopdeploy_export.capture.symbolic_forms import SymbolicForms
from sopdeploy_export.network import tensors
from sopdeploy_export.program_hashes import are_equal
from sopdeploy_export.prove.dataflow import Dataflow, GraphRun, Remains
from sopdeploy_export.prove.function_reads import FunctionReads
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.tensors import Layout

STATEMENT = (
    "For 1, 2 and 3 images, a plain run of the trained network, alone and again, performs the "
    "operators of its graph on the same operands, and no value or size that depends on an image "
    "reaches its code."
)
LARGEST = 3  # batches of 1 to so many images run: code can treat one image in its own way
REPEATED = 2  # the batch that runs twice
USE_TENSORS = "use operators of torch on all images, such as torch.where"


@dataclass(frozen=True, slots=True)
class Run:
    """A recorded run: its dataflow, what its outputs are known by, and their values."""

    flow: Dataflow
    results: tuple[str, ...]
    values: tuple[Tensor, ...]

    def first_other(self, other: "Run") -> str:
        """Describe the first operator behind the outputs that *other* does not run on the same operands.

        The text is "nothing else" if there is no such operator.
        """
        for result in self.results:
            for operator_hash, operator in self.flow.behind(result).items():
                if operator_hash not in other.flow.operators:
                    return str(operator)
        return "nothing else"


class Recorder:
    """Records runs of the network *trained* and of its graph on the last of uint8 *images* (N, H, W, 3).

    The last of the generated images are noise; the first ones have equal parts. What the network
    keeps of a run, such as a table, is there in the next one.

    Attributes:
        trained: The network.
        parts: Those of its parts that are removed.
        sizes: The sizes of the batches that are compared.
        repeated: The size of the batch that runs twice.
    """

    def __init__(
        self,
        trained: Compared,
        images: Tensor,
        largest_batch: int,
        parts: tuple[str, ...],
    ) -> None:
        self.trained = trained
        self.parts = parts
        self.sizes = tuple(range(1, min(LARGEST, largest_batch) + 1))
        self.repeated = min(REPEATED, largest_batch)
        self._images = images[-LARGEST:]
        self._deployed = trained.deployed

        # Memory of several tensors is known by the first one, so those that are kept come first.
        stored = tensors(trained.deployed)
        removed = tuple(NETWORK_PREFIX + part for part in parts)
        self._stored = dict(sorted(stored.items(), key=lambda item: is_in(item[0], *removed)))

        # The graph has its own buffers where a first run of the network creates or replaces them.
        created = {NETWORK_PREFIX + name for name in trained.trace.created}
        not_created = {
            name: tensor for name, tensor in self._stored.items() if name not in created
        }
        self._graph = GraphRun(trained.graph, not_created)

        # What runs leave for later ones, and the runs that are recorded once.
        self._remains = Remains()
        self._first: Run | None = None
        self._again: dict[int, Run] = {}  # by the number of images

    def run_first(self) -> Run:
        """Return the first plain run of all; it makes what later runs use, such as tables."""
        if self._first is None:
            self._first = self.run_network(self.repeated)
        return self._first

    def run_again(self, size: int) -> Run:
        """Return a plain run on *size* images that is not the first run of the network; it is recorded once."""
        self.run_first()
        if size not in self._again:
            self._again[size] = self.run_network(size)
        return self._again[size]

    def run_network(self, size: int) -> Run:
        """Record a plain run, and check it.

        Raises `CertificateError` if the network's code fails, and the errors of `check_run`.
        """
        images = self._images[:size].clone()
        flow = Dataflow(self._deployed, self._stored, images, self._remains)
        with _running(self._deployed):
            with flow, FunctionReads(flow), SymbolicForms():
                outputs = self._deployed(images)
            results = tuple(map(flow.known_by, outputs))
            values = tuple(output.clone() for output in outputs)

        # What is still held now, by the network or its code, is left for later runs.
        del outputs, images
        flow.leave()
        run = Run(flow, results, values)
        check_run(run)
        return run

    def run_graph(self, plain: Run) -> Run:
        """Record a run of the graph on the images of *plain*.

        The run takes the layouts of *plain*, and computes nothing that depends on an image. If this
        fails, for example because the graph has other operators, a second run computes everything.
        Raises `CertificateError` if that fails, too.
        """
        size = plain.values[0].shape[0]
        try:
            return self._run_graph(size, plain.flow.layouts)
        except CertificateError:
            return self._run_graph(size)

    def _run_graph(
        self, size: int, known_layouts: Mapping[str, Sequence[Layout]] | None = None
    ) -> Run:
        images = self._images[:size].clone()
        flow = Dataflow(self._deployed, self._stored, images, self._remains, known_layouts)
        self._graph.flow = flow
        with _running(self._deployed), flow:
            outputs = self._graph.run(images)
        return Run(flow, tuple(map(flow.known_by, outputs)), tuple(outputs))


@contextmanager
def _running(deployed: Deployed) -> Iterator[None]:
    """Let layers of *deployed* compute as in a graph in the block, without gradients, warnings and fast paths.

    Raises `CertificateError` if the network's code fails.
    """
    try:
        with torch.no_grad(), as_captured(deployed), _without_fast_path():
            yield
    except SopdeployError:
        raise
    except Exception as error:  # the network's own code
        problem = f"a plain run of the network fails: {first_line(error)}"
        if "FakeTensor" in problem:  # left by torch.export, in an object that is not restored
            problem = f"the network's code uses what an earlier run computed; {STATELESS}"
        raise CertificateError(problem) from error


def prove_plain_run(recorder: Recorder) -> None:
    """Prove that the network of *recorder* performs what its graph does.

    Raises `CertificateError` with the operator, module and line that differ.
    """
    first = recorder.run_first()
    for size in recorder.sizes:
        plain = recorder.run_again(size)
        captured = recorder.run_graph(plain)
        if plain.results != captured.results:
            raise CertificateError(
                f"with {amount(size, 'image')}, a plain run of the network does "
                "something else than its graph: the network runs "
                f"{plain.first_other(captured)}, the graph "
                f"{captured.first_other(plain)}; its code must depend on neither "
                "the batch size nor being exported, nor write outside of torch's "
                "operators"
            )
        if size == recorder.repeated:
            check_repeated(first, plain)


def check_run(run: Run) -> None:
    """Raise `CertificateError` for what the dataflow of *run* noted, and for outputs from random numbers."""
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
            f"{flow.hidden_writes[0]} writes to an operand, unlike its schema; "
            "declare what it mutates"
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
    """Raise `CertificateError` unless the run *again* performs, and returns, what the *first* one did."""
    if first.results != again.results:
        raise CertificateError(
            "a second run of the network does something else: the first one runs "
            f"{first.first_other(again)}, the second {again.first_other(first)}; "
            f"{STATELESS}"
        )
    if not all(map(are_equal, first.values, again.values)):
        raise CertificateError(f"a second run of the network gives other outputs; {STATELESS}")


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Switch off the fast path of `nn.MultiheadAttention`, and all warnings, in the block."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
