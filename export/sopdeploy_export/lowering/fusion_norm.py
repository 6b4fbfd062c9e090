"""Rule: the batch norm before a linear layer folded into it.

Algebra: in eval mode the norm is s x + t with s = gamma / sqrt(var + eps) and t = beta - s mean, so
W (s x + t) + b = (W diag(s)) x + (b + W t); dropout between does nothing. The fold is computed in float64 and
rounded once. A network that it was done to has no norm left, so it cannot be done twice.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from sopdeploy.blocks.fusion_head import FusionHead
from sopdeploy.errors import LoweringError
from sopdeploy_export.lowering.work import Work

NAME = "fusion batch norm folded into the classifier"


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


def apply(work: Work) -> None:
    """Fold the norm of every fusion head that has one, with frozen statistics."""
    for where, head in work.parts(FusionHead):
        norm = head.bn
        if not is_frozen(norm):
            continue
        work.replace(NAME, where, folded)
        work.note(
            NAME,
            where,
            f"eval statistics of {norm.num_features} features, one linear layer behind, dropout off",
            f"W diag(s), b + W t; {4 * norm.num_features} numbers fewer, no pass over the vector",
        )
