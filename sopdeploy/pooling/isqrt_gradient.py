"""iSQRT-COV with its own backward: fewer products and less memory than autograd takes.

Paper: iSQRT-COV, section 3.2. Letters as in `isqrt_root`; n rows of the matrix iterated on (d or M); a
name with `grad` is the gradient of the loss for it. X is centred, and so is its gradient: nothing is
left to do for the mean.

Asked with `create_graph=True`, as AdaHessian does, the gradient is autograd's of the plain forward,
which can be differentiated again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sopdeploy.pooling.covariance import centred
from sopdeploy.pooling.isqrt_root import SMALLEST_NORM, Rule, covariance_root, finish, normalise
from sopdeploy.pooling.newton_schulz import steps
from sopdeploy.pooling.newton_schulz_adjoint import steps_adjoint
from sopdeploy.pooling.precision import at_least_float32


def plain_vector(features_BdHW: Tensor, triangle: Tensor, rule: Rule) -> Tensor:
    """Return the upper triangle (B, d (d + 1) / 2) of the root, to be differentiated by autograd."""
    return covariance_root(features_BdHW, rule).flatten(start_dim=1).index_select(1, triangle)


def isqrt_vector(features_BdHW: Tensor, triangle: Tensor, rule: Rule) -> Tensor:
    """Return the upper triangle (B, d (d + 1) / 2) of the root of a map's covariance.

    Compilers and exporters see the plain operations.
    """
    if features_BdHW.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        vector: Tensor = ISqrtVector.apply(features_BdHW, triangle, rule)
        return vector
    return plain_vector(features_BdHW, triangle, rule)


class Kept(NamedTuple):
    """What the backward works from: the map, its norm (B, 1, 1), A or G, T_k and F_k (B, n, n)."""

    features: Tensor
    norm: Tensor
    matrix: Tensor
    ts: list[Tensor]
    fs: list[Tensor | None]
    rule: Rule

    def centred(self) -> Tensor:
        """Return sqrt(M) X (B, d, M) anew: a pass over the map; to keep it would double the map."""
        return centred(at_least_float32(self.features))


class ISqrtVector(torch.autograd.Function):
    """`plain_vector` with the gradient by hand; keeps the map and 2N matrices."""

    @staticmethod
    def forward(ctx: Any, features_BdHW: Tensor, triangle: Tensor, rule: Rule) -> Tensor:
        """Return the upper triangle (B, d (d + 1) / 2) of the root."""
        start = normalise(features_BdHW, rule)
        ts, fs = [], []
        for step in steps(start.matrix, rule.iterations):
            ts.append(step.t)
            fs.append(step.z if start.by_positions else step.y)
        vector = finish(start, step, rule).flatten(start_dim=1).index_select(1, triangle)
        ctx.rule, ctx.by_positions = rule, start.by_positions
        ctx.save_for_backward(features_BdHW, triangle, vector, start.norm, start.matrix, *ts, *fs[1:])
        return vector

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (B, d, H, W) for the map."""
        features_BdHW, triangle, vector, norm_B11, matrix_Bnn, *trail = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = plain_vector(features_BdHW, triangle, ctx.rule)
            return torch.autograd.grad(again, features_BdHW, grad, create_graph=True)[0], None, None
        ts, fs = trail[: ctx.rule.iterations], trail[ctx.rule.iterations :]
        first = None if ctx.by_positions else matrix_Bnn
        kept = Kept(features_BdHW, norm_B11, matrix_Bnn, ts, [first, *fs], ctx.rule)
        root_grad_Bdd = symmetric_gradient(grad, triangle, features_BdHW.shape[1])
        share_B11 = (grad * vector).sum(dim=1)[:, None, None]
        adjoint = position_adjoint if ctx.by_positions else channel_adjoint
        return (
            adjoint(kept, root_grad_Bdd, share_B11).view_as(features_BdHW).to(features_BdHW.dtype),
            None,
            None,
        )


def symmetric_gradient(grad: Tensor, triangle: Tensor, channels: int) -> Tensor:
    """Return the gradient of the triangle as that of a symmetric matrix (B, d, d)."""
    upper = grad.new_zeros(len(grad), channels * channels).index_add_(1, triangle, grad)
    upper_Bdd = upper.view(-1, channels, channels)
    return (upper_Bdd + upper_Bdd.transpose(1, 2)).mul_(0.5)


def channel_adjoint(kept: Kept, root_grad_Bdd: Tensor, share_B11: Tensor) -> Tensor:
    """Return the gradient for the map where the root is Y_N, times sqrt(norm) with compensation."""
    if kept.rule.compensate:
        product_grad_Bdd = product_adjoint(kept, root_grad_Bdd * kept.norm.sqrt(), 0.5 * share_B11)
    else:
        product_grad_Bdd = product_adjoint(kept, root_grad_Bdd, torch.zeros_like(share_B11))
    centred_BdM = kept.centred()
    return product_grad_Bdd.mul_(2.0 / centred_BdM.shape[2]) @ centred_BdM


def position_adjoint(kept: Kept, root_grad_Bdd: Tensor, share_B11: Tensor) -> Tensor:
    """Return the gradient for the map where the root is X P X^T, P = Z_N times a power of the norm."""
    power = -0.5 if kept.rule.compensate else -1.0
    last_f = kept.fs[-1]
    z_BMM = kept.ts[-1] if last_f is None else kept.ts[-1] @ last_f
    centred_BdM = kept.centred()
    scale_B11 = kept.norm.pow(power) / centred_BdM.shape[2]
    outer_grad_BdM = root_grad_Bdd @ centred_BdM
    inner_grad_BMM = (centred_BdM.transpose(1, 2) @ outer_grad_BdM) * scale_B11
    product_grad_BMM = product_adjoint(kept, inner_grad_BMM, power * share_B11)
    z_BMM = z_BMM * (2.0 * scale_B11)
    product_grad_BMM *= 2.0 / centred_BdM.shape[2]
    return torch.baddbmm(outer_grad_BdM @ z_BMM, centred_BdM, product_grad_BMM)


def product_adjoint(kept: Kept, f_grad_Bnn: Tensor, share_B11: Tensor) -> Tensor:
    """Return the gradient for X X^T or X^T X, given that for F_N and the norm's own share times the norm.

    A norm below the smallest is a constant and has no share.
    """
    matrix_grad_Bnn = steps_adjoint(f_grad_Bnn, kept.ts, kept.fs)
    through_matrix_B11 = (matrix_grad_Bnn * kept.matrix).sum(dim=(1, 2), keepdim=True)
    norm_grad_B11 = (share_B11 - through_matrix_B11) * (kept.norm > SMALLEST_NORM)
    if kept.rule.prenorm == "trace":
        matrix_grad_Bnn.diagonal(dim1=1, dim2=2).add_(norm_grad_B11[:, :, 0])
    else:
        matrix_grad_Bnn.addcmul_(kept.matrix, norm_grad_B11)
    return matrix_grad_Bnn / kept.norm
