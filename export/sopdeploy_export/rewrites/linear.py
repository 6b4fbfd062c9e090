"""Rule: post-compensation moved behind the linear layer.

Algebra: W (s v) + b = s (W v) + b for a scalar s per image. sqrt(trace) then multiplies the logits instead of
a d x d matrix. Legal only where the root's triangle goes straight into one linear layer and nowhere else,
with nothing but dropout between (which does nothing once trained). In the Gram domain the
scale divides an M x M matrix that is divided anyway, so there is nothing to gain and it stays.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.mixture.components import FusionHead
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.equivalence import prove, same_tensor
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot

NAME = "post-compensation behind the linear layer"


class RootThenLinear(nn.Module):
    """Feature map in, logits out: what the network computed before."""

    def __init__(self, root: LoweredRoot, linear: nn.Linear) -> None:
        super().__init__()
        self.root, self.linear = root, linear

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Return (B, classes) logits."""
        logits: Tensor = self.linear(self.root(features_BdHW))
        return logits


class CompensatedAfter(nn.Module):
    """Feature map in, logits out: the linear layer on the root without its scale, then scale and bias.

    `linear` is a part of its own, without bias, so that it may compute in another type than root and scale.
    """

    bias: Tensor | None

    def __init__(self, before: RootThenLinear) -> None:
        super().__init__()
        self.root, given = before.root, before.linear
        self.linear = nn.Linear(given.in_features, given.out_features, bias=False)
        self.linear.weight = given.weight
        self.register_parameter("bias", given.bias)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Return (B, classes) logits."""
        root_Bdd, scale_B11 = self.root.root(features_BdHW)
        vector = root_Bdd.flatten(start_dim=1).index_select(1, self.root.triangle)
        products: Tensor = self.linear(vector)
        if scale_B11 is not None:
            products = products * scale_B11[:, :, 0]
        return products if self.bias is None else products + self.bias


def apply(work: RewriteContext) -> None:
    """Move the scale of every root whose triangle only one linear layer reads."""
    for where, root in list(work.network.named_modules()):
        if not isinstance(root, LoweredRoot) or where not in work.calls or not root.config.compensate:
            continue
        reader = only_reader(work, where)
        features = work.calls[where].inputs
        linear = None if reader is None else work.network.get_submodule(reader)
        if reader is None or not isinstance(linear, nn.Linear) or root.root(features[0])[1] is None:
            continue
        pair = RootThenLinear(root, linear)
        prove(NAME, reader, pair, CompensatedAfter, features)
        work.put(where, nn.Identity())
        work.put(reader, CompensatedAfter(pair))
        width = root.triangle.numel()
        work.note(
            NAME,
            reader,
            f"the triangle of {where} goes into this linear layer and nowhere else; the scale is one number",
            f"it multiplies {linear.out_features} logits for {width} numbers of the root",
        )


def only_reader(work: RewriteContext, where: str) -> str | None:
    """Return the linear layer that alone reads what the part *where* gives, if there is one."""
    call = work.calls[where]
    readers = [
        name
        for name, other in work.calls.items()
        if name != where and any(same_tensor(given, call.output) for given in other.inputs)
    ]
    parts = {name: work.network.get_submodule(name) for name in readers}
    linear = [name for name, part in parts.items() if type(part) is nn.Linear]
    harmless = all(isinstance(part, nn.Linear | nn.Dropout | nn.Identity) for part in parts.values())
    if len(linear) != 1 or not harmless or call.times != 1 or work.calls[linear[0]].times != 1:
        return None
    return linear[0]


NAME_FUSION_NORM = "fusion batch norm folded into the classifier"


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return s and t of an eval batch norm in float64; refuse one without frozen statistics."""
    if not is_frozen(norm):
        raise LoweringError("a batch norm without frozen statistics does not fold")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = torch.rsqrt(variance.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -scale * mean.double()
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def is_frozen(norm: nn.Module) -> TypeGuard[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Say whether *norm* is a batch norm that uses running statistics, which no longer change."""
    return (
        isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        and not norm.training
        and norm.running_var is not None
    )


def folded(head: FusionHead) -> nn.Linear:
    """Return the linear layer that is batch norm and linear layer at once."""
    scale, shift = affine(head.bn)
    weight, bias = head.fc.weight.detach().double(), head.fc.bias.detach().double()
    one = nn.Linear(head.fc.in_features, head.fc.out_features).to(head.fc.weight.dtype)
    with torch.no_grad():
        one.weight.copy_(weight * scale)
        one.bias.copy_(bias + weight @ shift)
    return one


def apply_of_fusion_norm(work: RewriteContext) -> None:
    """Fold the norm of every fusion head that has one, with frozen statistics."""
    for where, head in work.parts(FusionHead):
        norm = head.bn
        if not is_frozen(norm):
            continue
        work.replace(NAME_FUSION_NORM, where, folded)
        work.note(
            NAME_FUSION_NORM,
            where,
            f"eval statistics of {norm.num_features} features, one linear layer behind, dropout off",
            f"W diag(s), b + W t; {4 * norm.num_features} numbers fewer, no pass over the vector",
        )
