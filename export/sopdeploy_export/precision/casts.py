"""Precision in the graph: casts are placed in a copy of the network, so every runtime sees the same types.

The copy is the one that the lowering rules rewrote, so that what ships is what they chose. The rule here is
one line: a part with weights takes its inputs in the type of its own weights. `ISLANDS` stay in float32 and
so does what they compute without weights: covariance, trace, Newton-Schulz, gate and softmax, and every mean
over a whole map. Experts multiply maps by their banks in the type of the maps, and take roots and sums in
float32. All outputs are float32.

fp16 takes all other parts to float16, the classifier too; bf16-backbone takes to bfloat16 what computes
feature maps and leaves the classifier alone. Newton-Schulz in float16 is a wish of its own: its matrices
are stored in float16 and multiplied in float32, which TensorRT runs as one float16 product with a float32
accumulator. bfloat16 there costs 5e-3 relative where float16 costs 7e-4, and is refused.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import Precision
from sopdeploy.layers.attention.gsop_attention import ChannelAttention, Excitation, PositionAttention
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import FusionHead
from sopdeploy.layers.mixture.gate import SparseGate
from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.module_names import is_in
from sopdeploy_export.precision.fold_batch_norm import fold_norms
from sopdeploy_export.rewrites.attention import FoldedExcitation
from sopdeploy_export.rewrites.equivalence import prove
from sopdeploy_export.rewrites.linear import CompensatedAfter
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot
from sopdeploy_export.rewrites.reference_formulas import ReferenceChannelAttention, ReferenceRoot

Part = TypeVar("Part", bound=nn.Module)
Iteration = Literal["fp32", "fp16"]
Calibration = Literal["minmax", "entropy", "percentile"]
FOLD = "batch norms folded into the convolutions"
STORED = {"fp16": torch.float16, "bf16-backbone": torch.bfloat16}
ROOTS = (ISqrtCov, LoweredRoot, ReferenceRoot)
ISLANDS = (GlobalPooling, *ROOTS, SparseGate, Excitation, FoldedExcitation, nn.BatchNorm1d)
ALONE = (CompensatedAfter,)  # islands but for their parts: root and scale here, the products in `linear`
RETURNING = (
    ChannelAttention,
    ReferenceChannelAttention,
    PositionAttention,
)  # they scale a map, and keep its type
REDUCTIONS = ("layer_reduce", "layer_reduce_bn")  # parts of a pooling that are ordinary convolutions


class Answer(nn.Module):
    """Normalised images in, the network's first output out."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        return self.network.outputs_tuple(pixels)[0]


def with_precision(
    network: Backbone, program: ExportedProgram, precision: Precision, pixels: Tensor
) -> Backbone:
    """Return a copy of *network*, in eval mode, that computes in *precision*, of `STORED`.

    *network* may have been rewritten by the lowering rules. *program* is its captured graph, which says which
    batch norms fold into the convolution before them. Raises `LoweringError` where the folded network gives
    other numbers for *pixels*, normalised images, in float64: the noise floor would take that for rounding.
    """

    def build(answer: Answer) -> Answer:
        fold_norms(answer.network, program)
        return answer

    prove(FOLD, "the network", Answer(network), build, (pixels,))
    folded = copy.deepcopy(network)
    fold_norms(folded, program)
    return place_casts(folded, precision)


def place_casts(network: Part, precision: Precision) -> Part:
    """Store the weights of *network* and place casts in it, as *precision*, of `STORED`, says."""
    stored, kept = STORED[precision], float32_parts(network, precision)
    for name, part in network.named_modules():
        own = torch.float32 if is_below(name, kept) or isinstance(part, ALONE) else stored
        store(part, own)
        if computes_with_weights(part) and not isinstance(part, ALONE):
            part.register_forward_pre_hook(inputs_as(own))
        elif isinstance(part, GlobalPooling) and not has_reduction(part):
            part.register_forward_pre_hook(inputs_as(torch.float32))
        if isinstance(part, RETURNING):
            part.register_forward_hook(output_as(stored))
    return network.eval()


def float32_parts(network: nn.Module, precision: Precision = "fp16") -> list[str]:
    """Return the names of the parts of *network* that keep float32, whole."""
    islands = (*ISLANDS, nn.Linear, FusionHead) if precision == "bf16-backbone" else ISLANDS
    return [name for name, part in network.named_modules() if isinstance(part, islands)]


def is_below(name: str, kept: Sequence[str]) -> bool:
    """Say whether the part *name* is one of *kept* or within one; reductions of a pooling are not."""
    if any(piece in REDUCTIONS for piece in name.split(".")):
        return False
    return any(part == "" or is_in(name, part) for part in kept)


def has_reduction(pooling: nn.Module) -> bool:
    """Say whether *pooling* begins with a convolution that computes in the type of the map."""
    return any(hasattr(pooling, name) for name in REDUCTIONS)


def computes_with_weights(part: nn.Module) -> bool:
    """Say whether *part* itself has weights, a list of them included, and not only parts that have."""
    own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    lists = [child for child in part.children() if isinstance(child, nn.ParameterList)]
    return bool(lists) or any(tensor.is_floating_point() for tensor in own)


def store(part: nn.Module, stored: torch.dtype) -> None:
    """Store the weights of *part* itself as *stored*; those of its parts stay."""
    for parameter in part.parameters(recurse=False):
        parameter.data = parameter.data.to(stored)
    for name, buffer in part.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(part, name, buffer.to(stored))


def inputs_as(wanted: torch.dtype) -> Callable[[nn.Module, Any], Any]:
    """Return a hook that gives a part its first input, the map, as *wanted*."""

    def cast(_part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (as_type(inputs[0], wanted), *inputs[1:])

    return cast


def output_as(wanted: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
    """Return a hook that gives away a part's output as *wanted*."""
    return lambda _part, _inputs, output: as_type(output, wanted)


def as_type(value: Any, wanted: torch.dtype) -> Any:
    """Return *value* as *wanted* where it is a floating-point tensor of another type."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == wanted:
        return value
    return value.to(wanted)
