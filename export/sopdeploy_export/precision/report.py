"""The content of `precision.json`: types, accuracy and int8 costs.

Types are read from the exported graph, not from the options: weights from its initializers, operations from
the captured program. A graph whose types differ from the requested ones is rejected.
"""

from collections import Counter

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.graph.onnx_export import PREFIX
from sopdeploy_export.precision.casts import LOW_PRECISION, Iteration, weight_dtypes
from sopdeploy_export.rewrites.attention import FoldedExcitation

TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
}


class PartPrecision(StrictModel):
    """The type of one part's weights in the file, and its operations by type."""

    part: str
    weights: str | None
    operations: dict[str, int]


class Cost(StrictModel):
    """Change of the logits, relative to their spread, if one part is quantized."""

    part: str
    share: float


class Quantization(StrictModel):
    """How int8 was produced and what it costs.

    Attributes:
        runtime: The runtime that the graph is quantized for.
        kept: Parts that `--keep-float` keeps in float32.
        calibration: Method that found the ranges.
        images: Number of calibration images.
        layers: Number of int8 convolutions.
        costs: The layers that cost most, in descending order.
        parts: All parts with int8 convolutions, in descending order of cost.
    """

    runtime: Int8For
    kept: tuple[str, ...]
    calibration: str
    images: int
    layers: int
    costs: tuple[Cost, ...]
    parts: tuple[Cost, ...] = ()


class Accuracy(StrictModel):
    """The float32 graph compared with the exported one on the same images.

    Attributes:
        images: Number of images.
        before: Top-1 of the float32 graph as a fraction; `None` without labels.
        after: Top-1 of the exported graph as a fraction; `None` without labels.
        agree: Number of images with the same top class.
        low: Lower end of the 95 % confidence interval of the fraction that agrees.
        high: Upper end of that interval.
        drop: Lost points of top-1; without labels the percentage of images that disagree, an upper bound.
    """

    images: int
    before: float | None
    after: float | None
    agree: int
    low: float
    high: float
    drop: float


class PrecisionReport(StrictModel):
    """The content of `precision.json`."""

    precision: Precision
    newton_schulz: Iteration
    parts: tuple[PartPrecision, ...]
    quantisation: Quantization | None = None
    accuracy: Accuracy | None = None

    def summary(self) -> dict[str, int]:
        """Count the parts by the type of their weights."""
        return dict(sorted(Counter(part.weights for part in self.parts if part.weights).items()))


def part_precisions(model: onnx.ModelProto, program: ExportedProgram) -> tuple[PartPrecision, ...]:
    """List the types of every named part, in the order of computation."""
    weights = weight_types(model)
    operations: dict[str, Counter[str]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "call_function" and stack and isinstance(value, torch.Tensor):
            part = stack[-1][0].removeprefix(PREFIX)
            if value.is_floating_point():
                operations.setdefault(part, Counter())[_name(value.dtype)] += 1
    return tuple(
        PartPrecision(
            part=name,
            weights=weights.get(name),
            operations=dict(sorted(operations.get(name, Counter[str]()).items())),
        )
        for name in dict.fromkeys([*operations, *weights])
    )


def weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Map each part to the type of its largest weight in *model*."""
    found: dict[str, tuple[int, str]] = {}
    for tensor in model.graph.initializer:
        part = tensor.name.rpartition(".")[0]
        size = len(tensor.raw_data)
        if part and tensor.data_type in TYPE_NAMES and size > found.get(part, (0, ""))[0]:
            found[part] = size, TYPE_NAMES[tensor.data_type]
    return {part: name for part, (_, name) in found.items()}


def check_weight_types(model: onnx.ModelProto, network: nn.Module, precision: Precision) -> None:
    """Raise `LoweringError` if a weight of *model* has not the requested type.

    *network* is the rewritten one before casts, so that a missing cast is detected.
    """
    found = weight_types(model)
    if precision == "int8" and "int8" not in found.values():
        raise LoweringError("int8 was requested, but no convolution of the graph is int8")
    if precision not in LOW_PRECISION:
        return
    dtypes = weight_dtypes(network, precision)
    expected = {
        name: _name(dtypes[name])
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.ParameterList | FoldedExcitation)
    }
    wrong = [part for part, name in expected.items() if found.get(part, name) != name]
    if wrong or _name(LOW_PRECISION[precision]) not in found.values():
        part = wrong[0] if wrong else next(iter(found), "no part")
        raise LoweringError(
            f"{precision} was requested, but the graph holds {part} in {found.get(part, 'no type')}: "
            f"{len(wrong)} of {len(expected)} parts have the wrong type"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
