"""Compare the operators of a program with their ONNX forms, on values that images hardly ever cause.

The converter writes some operators in a form that equals them for most values only: as two ONNX
operators of which the first overflows, or without one of the attributes. Each operator runs in
ONNX Runtime and in ATen, with its own shapes and attributes, on zeros of both signs, ties,
large values, denormals, the largest finite values, infinities and NaN. An operator that
combines elements also gets operands without any difference: all False, all 0, some elements
among equal ones and, if its operands can be such, all infinite or all NaN. Both compute in the
type of the network, and in float32 at least.

The converter and ONNX Runtime can make one operator of two, such as a cast to int32 of one to
int64. Two successive operators for which others are executed than for each of them are compared
as a pair, too.
"""

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx.utils import Extractor
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.deployed import INPUT, generated_images, output_names
from sopdeploy_export.capture.program import capture_any_batch, capturing
from sopdeploy_export.lower.compared import list_forms
from sopdeploy_export.lower.constant_parts import fold_constant_parts
from sopdeploy_export.lower.forms import decompose
from sopdeploy_export.lower.to_onnx import to_ir, translate
from sopdeploy_export.runs import PROVIDER
from tests.operators.chains import ORDINARY, Chain, record_chains
from tests.operators.values import check_result, fill, fill_in_rounds

OPERANDS = 400  # of the chains that are captured at once; a capture also takes a constant time

# The ONNX operators of what this process has compared, by description.
_executed_operators: dict[str, Counter[str]] = {}


@torch.no_grad()
def check_operators(program: ExportedProgram, images: NDArray[np.uint8]) -> None:
    """Compare the operators of *program*, which runs on uint8 *images* (B, H, W, 3), with their ONNX forms.

    Operators of complex numbers, and those that are not of ATen, are left out. Operators with
    the same description, which has attributes, shapes and ranges, are compared once in a process.
    Raises `LoweringError` if ONNX Runtime cannot run an operator, or if the results differ; then
    the message has the operator, the part of the network and the values.
    """
    module = program.module(check_guards=False)
    chains = record_chains(module, torch.from_numpy(images), _executed_operators.keys())
    last = next(reversed(chains), None)

    # Compare groups, because the time of a capture grows with the square of its number of
    # operands.
    group: dict[str, Chain] = {}
    num_operands = 0
    for description, chain in chains.items():
        group[description] = chain
        num_operands += len(chain.operands)
        if num_operands >= OPERANDS or description == last:
            _compare_group(group)
            num_operands = 0
            group = {}


def compare_forms(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> list[str]:
    """Compare the operators of *network* with their ONNX forms, and return these forms."""
    program = fold_constant_parts(capture_any_batch(network, preprocess, batch))
    check_operators(program, generated_images(preprocess.crop)[: min(2, batch.maximum)])
    return [*list_forms(translate(decompose(program), [INPUT], output_names(network)))]


class Minimal(nn.Module):
    """A network of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def check_function(function: Callable[[Tensor], Tensor], preprocess: Preprocess) -> None:
    """Compare the operators of *function*, which is the part `1` of a network, for one image."""
    network = nn.Sequential(nn.Identity(), Minimal(function)).eval()
    program = capture_any_batch(network, preprocess, BatchRange(optimum=1, maximum=1))
    check_operators(program, generated_images(preprocess.crop)[:1])


class _Chains(nn.Module):
    """Runs *chains* one by one, each on its own operands."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        super().__init__()
        self.chains = chains

    def forward(self, *operands: Tensor) -> list[Tensor]:
        """Compute the results of the last operator of each chain."""
        remaining = iter(operands)
        results = []
        for chain in self.chains:
            results_by_operator = chain.run([next(remaining) for _ in chain.operands])
            results += results_by_operator[-1]
        return results


class _CapturedChain(NamedTuple):
    """A chain in the graph of a group, and the names that its operands and results have there."""

    description: str
    chain: Chain
    operand_names: list[str]
    result_names: list[str]


def _compare_group(chains: Mapping[str, Chain]) -> None:
    """Compare *chains*, and note in `_executed_operators` what ONNX Runtime executes for each.

    A pair is compared only if ONNX Runtime executes other operators for it than for its two
    operators one by one. Raises `LoweringError` for the first chain that it cannot run or that
    differs.
    """
    # The names of the operands and results of each chain in the graph of the group.
    captured = []
    for i, (description, chain) in enumerate(chains.items()):
        operand_names = [f"operand {i} {j}" for j in range(len(chain.operands))]
        result_names = [f"result {i} {j}" for j in chain.last.used]
        captured.append(_CapturedChain(description, chain, operand_names, result_names))

    # Capture all in one graph, and convert it.
    operands = tuple(
        itertools.chain.from_iterable(fill(chain, ORDINARY, 0) for chain in chains.values())
    )
    with capturing():
        program = torch.export.export(_Chains([*chains.values()]), operands)
    inputs = [name for each in captured for name in each.operand_names]
    outputs = [name for each in captured for name in each.result_names]
    model = ir.to_proto(to_ir(program, inputs, outputs))

    # Compare the single operators. ONNX Runtime loads each of them before the whole graph, so that
    # an error names the operator that cannot run.
    extractor = Extractor(model)
    singles = [single for single in captured if len(single.chain.operators) == 1]
    pairs = [pair for pair in captured if len(pair.chain.operators) == 2]
    for single in singles:
        _compare_values(single, extractor)

    # Count what ONNX Runtime executes for each chain, in the whole graph after its
    # optimization.
    producers = _executed_producers(model)
    executed = {
        each.description: _count_operators(producers, each.result_names) for each in captured
    }

    # Compare the pairs for which it executes others than for their two operators. These may
    # have been counted in an earlier group, by the description of the operator as it is
    # recorded: alone and cropped.
    known = {**_executed_operators, **executed}
    for pair in pairs:
        first, second = (
            Chain((operator,)).cropped().describe() for operator in pair.chain.operators
        )
        if known[pair.description] != known[first] + known[second]:
            _compare_values(pair, extractor)

    _executed_operators.update(executed)  # not before a comparison, which can raise an error


def _executed_producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Map each value to the node that computes it after ONNX Runtime has optimized *model*."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
        optimized = onnx.load(options.optimized_model_filepath)
    return {name: node for node in optimized.graph.node for name in node.output}


def _count_operators(
    producers: Mapping[str, onnx.NodeProto], results: Sequence[str]
) -> Counter[str]:
    """Count the operators that *results* depend on, by type; a copy (`Identity`) does not count."""
    operators: Counter[str] = Counter()
    names_to_visit = list(results)
    visited: set[str] = set()

    while names_to_visit:
        name = names_to_visit.pop()
        if name in visited or name not in producers:  # inputs and constants have no producer
            continue
        node = producers[name]
        visited.update(node.output)
        names_to_visit += node.input
        if node.op_type != "Identity":
            operators[node.op_type] += 1

    return operators


def _compare_values(captured: _CapturedChain, extractor: Extractor) -> None:
    """Run a chain and its ONNX form, a part of the graph of *extractor*, on many values.

    Raises `LoweringError` if the form cannot run or gives other results.
    """
    # A result that became a constant depends on shapes only, as that of `zeros_like` does: no value
    # can make it wrong.
    chain = captured.chain
    constants = {tensor.name for tensor in extractor.graph.initializer}
    if not constants.isdisjoint(captured.result_names):
        return

    # The ONNX form alone.
    form = extractor.extract_model(captured.operand_names, captured.result_names)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # prints fatal errors only; the others are raised
    try:
        session = ort.InferenceSession(form.SerializeToString(), options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's errors share no base class
        problem = f"ONNX Runtime cannot run its ONNX form: {first_line(error)}"
        raise LoweringError(f"{chain.last.target}: {problem}") from error

    # The ONNX form can need fewer operands than the chain.
    needed_names = {value.name for value in session.get_inputs()}
    for operands in fill_in_rounds(chain):
        named = zip(captured.operand_names, operands, strict=True)
        inputs = {name: operand.numpy() for name, operand in named if name in needed_names}
        results = session.run(captured.result_names, inputs)

        results_by_operator = chain.run(operands)
        for result, expected in zip(results, results_by_operator[-1], strict=True):
            check_result(chain, operands, torch.from_numpy(result), expected)
