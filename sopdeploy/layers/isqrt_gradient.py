"""The root that iSQRT-COV pools, as a function of the feature map, over channels or over positions.

Paper: iSQRT-COV, section 3. Letters: B images, d channels, M positions, N iterations; X is the map,
centred and divided by sqrt(M).

Every iterate is a polynomial in A = X X^T / n, so the N steps may as well run on the M x M Gram matrix
G = X^T X / n: with Z_N the other iterate of Newton-Schulz on G, Y_N(A) = X Z_N(G) X^T / n. This is the
same polynomial, not an approximation, and where M < d it takes fewer products: 7 x 7 and 14 x 14 maps
of 256 channels, 8 x 8 maps of 128. It is computed in float32 at least: in half precision the Gram
form finds negative eigenvalues where there are none.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sopdeploy.layers.covariance import (
    at_least_float32,
    centred,
    centred_positions,
    covariance,
    covariance_trace,
    frobenius_norm,
)
from sopdeploy.layers.newton_schulz import Step, last_step, steps, steps_adjoint

SMALLEST_NORM = 1e-12  # a constant map has norm 0; its answer is then 0, with finite gradients


class Rule(NamedTuple):
    """The switches of `ISqrtCovConfig` that the root depends on.

    `stored` is the type of the matrices between two products; an exporter may choose float16. It says how
    float32 is rounded: a run in float64, the reference, stores float64.
    """

    iterations: int
    prenorm: Literal["trace", "frobenius"]
    compensate: bool
    stored: Literal["float32", "float16"] = "float32"


class Normalised(NamedTuple):
    """X as (B, d, M), its norm n as (B, 1, 1), and the matrix that the iteration takes.

    That is A (B, d, d), or G (B, M, M) where `by_positions`.
    """

    x: Tensor
    norm: Tensor
    matrix: Tensor
    by_positions: bool


def positions_are_cheaper(channels: int, positions: int, iterations: int) -> bool:
    """Return whether the iteration on G takes fewer multiply-adds than that on A.

    For N = 5 this says M < 0.95 d. Shapes that are not known beforehand stay with the channels.
    """
    if type(positions) is not int or type(channels) is not int:
        return False
    products = max(1, 3 * iterations - 3)
    by_channels = products * channels**3
    return products * positions**3 + 2 * channels * positions**2 < by_channels


def normalise(features_BdHW: Tensor, rule: Rule) -> Normalised:
    """Return what the iteration starts from: centred, multiplied, divided by trace or Frobenius norm.

    Both have the same trace and the same Frobenius norm, whichever way round the product is.
    """
    x_BdM = centred_positions(at_least_float32(features_BdHW))
    by_positions = positions_are_cheaper(x_BdM.shape[1], x_BdM.shape[2], rule.iterations)
    by_positions = by_positions and rule.stored == "float32"
    matrix_Bnn = covariance(x_BdM.transpose(1, 2) if by_positions else x_BdM)
    norm_B11 = covariance_trace(matrix_Bnn) if rule.prenorm == "trace" else frobenius_norm(matrix_Bnn)
    norm_B11 = norm_B11.clamp_min(SMALLEST_NORM)
    return Normalised(x_BdM, norm_B11, matrix_Bnn / norm_B11, by_positions)


def finish(start: Normalised, last: Step, rule: Rule) -> Tensor:
    """Return the root (B, d, d) from the last step: Y_N, times sqrt(n) with compensation."""
    if start.by_positions:
        return start.x @ inner_root(start, last, rule) @ start.x.transpose(1, 2)
    y_Bdd = at_least_float32(last.next_y())
    return y_Bdd * start.norm.sqrt() if rule.compensate else y_Bdd


def inner_root(start: Normalised, last: Step, rule: Rule) -> Tensor:
    """Return P (B, M, M) of the root X P X^T: Z_N / n, times sqrt(n) with compensation."""
    return last.next_z() / (start.norm.sqrt() if rule.compensate else start.norm)


def covariance_root(features_BdHW: Tensor, rule: Rule) -> Tensor:
    """Return the root (B, d, d) of the covariance of a map, to be differentiated by autograd."""
    start = normalise(features_BdHW, rule)
    return finish(start, last_step(as_stored(start.matrix, rule), rule.iterations), rule)


def as_stored(matrix_Bnn: Tensor, rule: Rule) -> Tensor:
    """Return a float32 matrix in the type that *rule* stores it in between two products."""
    return matrix_Bnn.half() if rule.stored == "float16" and matrix_Bnn.dtype == torch.float32 else matrix_Bnn


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


class SavedForBackward(NamedTuple):
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
        kept = SavedForBackward(features_BdHW, norm_B11, matrix_Bnn, ts, [first, *fs], ctx.rule)
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


def channel_adjoint(kept: SavedForBackward, root_grad_Bdd: Tensor, share_B11: Tensor) -> Tensor:
    """Return the gradient for the map where the root is Y_N, times sqrt(norm) with compensation."""
    if kept.rule.compensate:
        product_grad_Bdd = product_adjoint(kept, root_grad_Bdd * kept.norm.sqrt(), 0.5 * share_B11)
    else:
        product_grad_Bdd = product_adjoint(kept, root_grad_Bdd, torch.zeros_like(share_B11))
    centred_BdM = kept.centred()
    return product_grad_Bdd.mul_(2.0 / centred_BdM.shape[2]) @ centred_BdM


def position_adjoint(kept: SavedForBackward, root_grad_Bdd: Tensor, share_B11: Tensor) -> Tensor:
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


def product_adjoint(kept: SavedForBackward, f_grad_Bnn: Tensor, share_B11: Tensor) -> Tensor:
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
