"""Rules of linear layers: post-compensation and fusion norm.

- Post-compensation: W (s v) + b = s (W v) + b for a scalar s per image. The scale then multiplies the logits
  instead of a d x d matrix. The rule applies if a single linear layer reads the triangle of the root,
  directly or through dropout, which does nothing in eval mode. It does not apply in the Gram domain, where
  the scale costs nothing because it is part of another division.
- Fusion norm: W (s v + t) + b = (W diag(s)) v + (b + W t).
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.mixture.components import FusionHead
from sopdeploy_export.rewrites.context import RewriteContext, assert_equivalent
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot

COMPENSATION = "post-compensation after the linear layer"
FUSION_NORM = "fusion batch norm folded into the classifier"


class RootThenLinear(nn.Module):
    """The original computation: a root followed by a linear layer."""

    def __init__(self, root: LoweredRoot, linear: nn.Linear) -> None:
        super().__init__()
        self.root, self.linear = root, linear

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute (B, classes) logits."""
        logits: Tensor = self.linear(self.root(features_BdHW))
        return logits


class CompensatedAfter(nn.Module, ExportHints):
    """Apply the linear layer to the root without its scale, then multiply by the scale and add the bias.

    The child `linear` has no bias, so that its dtype may differ from that of the root, scale and bias.
    """

    keep_float32 = True
    computes_roots = True
    low_precision_children = ("linear",)
    bias: Tensor | None

    def __init__(self, before: RootThenLinear) -> None:
        super().__init__()
        self.root, self.config, original = before.root, before.root.config, before.linear
        self.linear = nn.Linear(original.in_features, original.out_features, bias=False)
        self.linear.weight = original.weight
        self.register_parameter("bias", original.bias)

    def roots(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps and their roots (B, d, d), for the parity checks."""
        return self.root.roots(features_BdHW)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute (B, classes) logits."""
        root_Bdd, scale_B11 = self.root.root(features_BdHW)
        vector = root_Bdd.flatten(start_dim=1).index_select(1, self.root.triangle)
        products: Tensor = self.linear(vector)
        if scale_B11 is not None:
            products = products * scale_B11[:, :, 0]
        return products if self.bias is None else products + self.bias


def move_compensation(context: RewriteContext, where: str, root: LoweredRoot) -> None:
    """Apply the scale of *root* after the next linear layer, if nothing else reads the root's triangle."""
    reader = _only_reader(context, where) if root.config.compensate else None
    features = context.activations[where].inputs
    if reader is None or root.root(features[0])[1] is None:
        return
    linear = context.network.get_submodule(reader)
    if not isinstance(linear, nn.Linear):
        return
    pair = RootThenLinear(root, linear)
    assert_equivalent(COMPENSATION, reader, pair, CompensatedAfter, features)
    context.put(where, nn.Identity())
    context.put(reader, CompensatedAfter(pair))
    context.report(
        COMPENSATION,
        reader,
        f"only this linear layer reads the triangle of {where}; the scale is one number per image",
        f"it multiplies {linear.out_features} logits instead of {root.triangle.numel()} numbers of the root",
    )


def _only_reader(context: RewriteContext, where: str) -> str | None:
    """Return the linear layer that reads the output of the part *where*; None if other parts read it too."""
    call = context.activations[where]
    readers = {
        name: context.network.get_submodule(name)
        for name, other in context.activations.items()
        if name != where
        and any(  # the same memory, also through dropout in eval mode or flattening
            given.data_ptr() == call.output.data_ptr() and given.numel() == call.output.numel()
            for given in other.inputs
        )
    }
    linear = [name for name, part in readers.items() if type(part) is nn.Linear]
    harmless = all(isinstance(part, nn.Linear | nn.Dropout | nn.Identity) for part in readers.values())
    if len(linear) != 1 or not harmless or call.times != 1 or context.activations[linear[0]].times != 1:
        return None
    return linear[0]


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute scale and shift of a batch norm in eval mode, in float64.

    Raises `LoweringError` if its statistics are not frozen.
    """
    if not is_frozen(norm):
        raise LoweringError("a batch norm without frozen statistics cannot be folded")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = torch.rsqrt(variance.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -scale * mean.double()
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def is_frozen(norm: nn.Module) -> TypeGuard[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Return whether *norm* is a batch norm in eval mode with running statistics."""
    return (
        isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        and not norm.training
        and norm.running_var is not None
    )


def fold_head(head: FusionHead) -> nn.Linear:
    """Combine the batch norm and the linear layer of *head* in one linear layer."""
    scale, shift = affine(head.bn)
    weight, bias = head.fc.weight.detach().double(), head.fc.bias.detach().double()
    linear = nn.Linear(head.fc.in_features, head.fc.out_features).to(head.fc.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight * scale)
        linear.bias.copy_(bias + weight @ shift)
    return linear


def fold_fusion_norm(context: RewriteContext, where: str, head: FusionHead) -> None:
    """Fold the frozen batch norm of one fusion head into its linear layer."""
    norm = head.bn
    if is_frozen(norm):
        context.replace(FUSION_NORM, where, fold_head)
        context.report(
            FUSION_NORM,
            where,
            f"eval statistics of {norm.num_features} features, followed by one linear layer, dropout off",
            f"W diag(s), b + W t; {4 * norm.num_features} numbers and one pass over the vector fewer",
        )
