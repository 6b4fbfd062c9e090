"""What `precision.json` says: the type of every named part, what was lost by it, and which layers cost most.

Types are read off the graph that ships, not off what was asked: weights by their initializers, operations
by the captured graph. A graph whose types are not those asked for is refused.
"""

from collections import Counter
from collections.abc import Mapping

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.precision.casts import STORED, Iteration, float32_parts, is_below
from sopdeploy_export.rewrites.attention import FoldedExcitation

PREFIX = "network."
TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
}


class PartPrecision(StrictModel):
    """One part: the type of its weights in the file, none where it has none, and operations by type."""

    part: str
    weights: str | None
    operations: dict[str, int]


class Cost(StrictModel):
    """How far quantising this layer or part alone moves the logits, as a share of their spread."""

    part: str
    share: float


class Quantisation(StrictModel):
    """For which runtime, how the ranges were found, how many layers are int8, and what costs most.

    `costs` are the dearest layers, `parts` all parts of the network that hold layers, the dearest first.
    `kept` are the parts that were asked to stay in float32, `--keep-float`.
    """

    runtime: Int8For
    kept: tuple[str, ...]
    calibration: str
    images: int
    layers: int
    costs: tuple[Cost, ...]
    parts: tuple[Cost, ...] = ()


class Accuracy(StrictModel):
    """The float32 graph against the one that ships, on the same pictures.

    `before` and `after` are shares of right answers, absent without labels; `agree` of `images` have the
    same top class, a share between `low` and `high` at 95 %. `drop` is in points: what was lost of top-1,
    or without labels the share of disagreement, which it cannot exceed.
    """

    images: int
    before: float | None
    after: float | None
    agree: int
    low: float
    high: float
    drop: float


class PrecisionReport(StrictModel):
    """Everything said about the precision of one bundle."""

    precision: Precision
    newton_schulz: Iteration
    parts: tuple[PartPrecision, ...]
    quantisation: Quantisation | None = None
    accuracy: Accuracy | None = None

    def summary(self) -> dict[str, int]:
        """Return how many parts have weights of each type."""
        return dict(sorted(Counter(part.weights for part in self.parts if part.weights).items()))


def part_precisions(model: onnx.ModelProto, program: ExportedProgram) -> tuple[PartPrecision, ...]:
    """Return the types of every named part, in the order of computing."""
    weights = weight_types(model)
    operations: dict[str, Counter[str]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "call_function" and stack and isinstance(value, torch.Tensor):
            part = stack[-1][0].removeprefix(PREFIX)
            if value.is_floating_point():
                operations.setdefault(part, Counter())[str(value.dtype).removeprefix("torch.")] += 1
    names = dict.fromkeys([*operations, *weights])
    return tuple(
        PartPrecision(
            part=name,
            weights=weights.get(name),
            operations=dict(sorted(operations.get(name, Counter[str]()).items())),
        )
        for name in names
    )


def weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the type of each part's largest weight in *model*."""
    found: dict[str, tuple[int, str]] = {}
    for tensor in model.graph.initializer:
        part = tensor.name.rpartition(".")[0]
        size = len(tensor.raw_data)
        if part and tensor.data_type in TYPE_NAMES and size > found.get(part, (0, ""))[0]:
            found[part] = size, TYPE_NAMES[tensor.data_type]
    return {part: name for part, (_, name) in found.items()}


def refuse_other_types(model: onnx.ModelProto, network: nn.Module, precision: Precision) -> None:
    """Refuse a graph whose weights are not of the types that *precision* gives the parts of *network*.

    *network* is the one before casts, so that a cast that was never placed shows: a part of a rewritten
    network has its rewritten name.
    """
    if precision == "int8" and "int8" not in weight_types(model).values():
        raise LoweringError("int8 was asked for, but no convolution of the graph is int8")
    if precision not in STORED:
        return
    found, wanted = weight_types(model), expected_types(network, precision)
    wrong = [part for part, name in wanted.items() if found.get(part, name) != name]
    if wrong or not set(found.values()) & {str(STORED[precision]).removeprefix("torch.")}:
        part = wrong[0] if wrong else next(iter(found), "no part")
        raise LoweringError(
            f"{precision} was asked for, but the graph holds {part} in {found.get(part, 'no type')}: "
            f"{len(wrong)} of {len(wanted)} parts have another type than they should"
        )


def expected_types(network: nn.Module, precision: Precision) -> Mapping[str, str]:
    """Return the type that the weights of each part of *network* should have."""
    kept = float32_parts(network, precision)
    low = str(STORED[precision]).removeprefix("torch.")
    return {
        name: "float32" if is_below(name, kept) else low
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.ParameterList | FoldedExcitation)
    }
