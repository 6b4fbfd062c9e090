"""iSQRT-COV: covariance pooling with an iterative matrix square root ("fast MPN-COV", "SR-SOP").

Paper: iSQRT-COV, section 3; DSoP section III-A uses it in every branch.
Letters: B images, d channels, M positions, N iterations; X is the map, centered (by default) and divided by
sqrt(M).

The iteration runs on A = X X^T / n or on the M x M Gram matrix G = X^T X / n. Every iterate is a polynomial
in A, so with Z_N the second iterate of Newton-Schulz on G, Y_N(A) = X Z_N(G) X^T / n. This is the same
polynomial, not an approximation. Where M < d it takes fewer products: 7 x 7 and 14 x 14 maps of 256 channels,
8 x 8 maps of 128. Both run in float32 or float64: in half precision the Gram matrix has negative eigenvalues.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sopdeploy.layers.covariance import (
    at_least_float32,
    centered,
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
    scaled,
    upper_triangle_indices,
    without_autocast,
)
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.newton_schulz import (
    NewtonSchulzConfig,
    Step,
    steps,
    steps_adjoint,
)

SMALLEST_NORM = 1e-12  # a constant map has norm 0; its root is then 0, with finite gradients


class ISqrtCov(nn.Module, ExportHints):
    """Pool (B, d, H, W) maps to the upper triangle (B, d (d + 1) / 2) of the square root of their covariance.

    *width* is d. The root is computed in float32 or float64, also under autocast. Training uses a handwritten
    gradient; compilers and exporters trace the plain operations.
    """

    keep_float32 = True
    triangle: Tensor

    def __init__(self, width: int = 256, config: NewtonSchulzConfig | None = None) -> None:
        super().__init__()
        self.width = width
        self.config = config or NewtonSchulzConfig()
        self.out_features = width * (width + 1) // 2
        self.register_buffer("triangle", upper_triangle_indices(width), persistent=False)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle, row by row."""
        trains = features_BdHW.requires_grad and torch.is_grad_enabled()
        with without_autocast(features_BdHW):
            if trains and not torch.compiler.is_compiling():
                vector: Tensor = ISqrtVector.apply(features_BdHW, self.triangle, self.config)
                return vector
            return isqrt_vector(features_BdHW, self.triangle, self.config)


def gram_is_cheaper(channels: int, positions: int, iterations: int) -> bool:
    """Decide whether the iteration on G takes fewer multiply-adds than on A (for N = 5: M < 0.95 d).

    Shapes that are symbolic during tracing use A.
    """
    if type(positions) is not int or type(channels) is not int:
        return False
    products = max(1, 3 * iterations - 3)
    return products * positions**3 + 2 * channels * positions**2 < products * channels**3


def deviations(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Flatten a map to (B, d, M) and subtract its mean, if *config* says so."""
    map_BdHW = at_least_float32(features_BdHW)
    return centered(map_BdHW) if config.centered else map_BdHW.flatten(start_dim=2)


class Prenormalized(NamedTuple):
    """Input of the Newton-Schulz iteration: X (B, d, M), its norm n (B, 1, 1), and A or G as `matrix`.

    A has the shape (B, d, d); G, with `use_gram`, has (B, M, M).
    """

    x: Tensor
    norm: Tensor
    matrix: Tensor
    use_gram: bool


def prenormalize(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Prenormalized:
    """Center the map if *config* says so, multiply it with itself, divide by the trace or Frobenius norm.

    X X^T and X^T X have the same trace and the same Frobenius norm.
    """
    map_BdHW = at_least_float32(features_BdHW)
    x_BdM = centered_and_scaled(map_BdHW) if config.centered else scaled(map_BdHW)
    use_gram = gram_is_cheaper(x_BdM.shape[1], x_BdM.shape[2], config.iterations)
    matrix_Bnn = covariance(x_BdM.transpose(1, 2) if use_gram else x_BdM)
    norm_B11 = covariance_trace(matrix_Bnn) if config.prenorm == "trace" else frobenius_norm(matrix_Bnn)
    norm_B11 = norm_B11.clamp_min(SMALLEST_NORM)
    return Prenormalized(x_BdM, norm_B11, matrix_Bnn / norm_B11, use_gram)


def covariance_root(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the root (B, d, d) of the covariance of a map with operations that autograd differentiates."""
    start = prenormalize(features_BdHW, config)
    for step in steps(start.matrix, config.iterations):  # noqa: B007 - the last one
        pass
    return _root(start, step, config)


def isqrt_vector(features_BdHW: Tensor, triangle: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the upper triangle (B, d (d + 1) / 2) of `covariance_root`."""
    return covariance_root(features_BdHW, config).flatten(start_dim=1).index_select(1, triangle)


def _root(start: Prenormalized, last: Step, config: NewtonSchulzConfig) -> Tensor:
    """Compute the root (B, d, d) from the last step: Y_N, times sqrt(n) with compensation."""
    if start.use_gram:
        inner_BMM = last.next_z() / (start.norm.sqrt() if config.compensate else start.norm)
        return start.x @ inner_BMM @ start.x.transpose(1, 2)
    y_Bdd = last.next_y()
    return y_Bdd * start.norm.sqrt() if config.compensate else y_Bdd


class _Saved(NamedTuple):
    """Tensors for the backward pass: the map, its norm (B, 1, 1), A or G, and T_k and F_k of every step.

    `steps_adjoint` defines T and F.
    """

    features: Tensor
    norm: Tensor
    matrix: Tensor
    ts: list[Tensor]
    fs: list[Tensor | None]
    config: NewtonSchulzConfig


class ISqrtVector(torch.autograd.Function):
    """`isqrt_vector` with a handwritten gradient that saves the map and 2N matrices."""

    @staticmethod
    def forward(ctx: Any, features_BdHW: Tensor, triangle: Tensor, config: NewtonSchulzConfig) -> Tensor:
        """Compute the upper triangle (B, d (d + 1) / 2) of the root."""
        start = prenormalize(features_BdHW, config)
        ts, fs = [], []
        for step in steps(start.matrix, config.iterations):
            ts.append(step.t)
            fs.append(step.z if start.use_gram else step.y)
        vector = _root(start, step, config).flatten(start_dim=1).index_select(1, triangle)
        ctx.config, ctx.use_gram = config, start.use_gram
        ctx.save_for_backward(features_BdHW, triangle, vector, start.norm, start.matrix, *ts, *fs[1:])
        return vector

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient (B, d, H, W) of the map; second derivatives go through autograd."""
        features, triangle, vector, norm_B11, matrix_Bnn, *trail = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = isqrt_vector(features, triangle, ctx.config)
            return torch.autograd.grad(again, features, grad, create_graph=True)[0], None, None
        ts, fs = trail[: ctx.config.iterations], trail[ctx.config.iterations :]
        first = None if ctx.use_gram else matrix_Bnn
        saved = _Saved(features, norm_B11, matrix_Bnn, ts, [first, *fs], ctx.config)
        channels = features.shape[1]
        upper = grad.new_zeros(len(grad), channels * channels).index_add_(1, triangle, grad)
        upper_Bdd = upper.view(-1, channels, channels)
        root_grad_Bdd = (upper_Bdd + upper_Bdd.transpose(1, 2)).mul_(0.5)
        root_dot_grad_B11 = (grad * vector).sum(dim=1)[:, None, None]
        adjoint = _gram_adjoint if ctx.use_gram else _channel_adjoint
        gradient = adjoint(saved, root_grad_Bdd, root_dot_grad_B11)
        return gradient.view_as(features).to(features.dtype), None, None


def _channel_adjoint(saved: _Saved, root_grad_Bdd: Tensor, root_dot_grad_B11: Tensor) -> Tensor:
    """Compute the gradient (B, d, M) of the map if the iteration runs on A.

    With compensation the root is n^(1/2) Y_N, so n receives 1/2 <root, its gradient> / n. Without it the root
    is Y_N, and n receives nothing here. *root_dot_grad_B11* is this inner product.
    """
    if saved.config.compensate:
        product_grad_Bdd = _product_adjoint(saved, root_grad_Bdd * saved.norm.sqrt(), 0.5 * root_dot_grad_B11)
    else:
        product_grad_Bdd = _product_adjoint(saved, root_grad_Bdd, torch.zeros_like(root_dot_grad_B11))
    deviation_BdM = deviations(saved.features, saved.config)  # not saved: it is as large as the map
    return product_grad_Bdd.mul_(2.0 / deviation_BdM.shape[2]) @ deviation_BdM


def _gram_adjoint(saved: _Saved, root_grad_Bdd: Tensor, root_dot_grad_B11: Tensor) -> Tensor:
    """Compute the gradient (B, d, M) of the map if the iteration runs on G.

    The root is n^power X Z_N X^T, so n receives power <root, its gradient> / n.
    """
    power = -0.5 if saved.config.compensate else -1.0
    last_f = saved.fs[-1]
    z_BMM = saved.ts[-1] if last_f is None else saved.ts[-1] @ last_f
    deviation_BdM = deviations(saved.features, saved.config)
    scale_B11 = saved.norm.pow(power) / deviation_BdM.shape[2]
    outer_grad_BdM = root_grad_Bdd @ deviation_BdM
    inner_grad_BMM = (deviation_BdM.transpose(1, 2) @ outer_grad_BdM) * scale_B11
    product_grad_BMM = _product_adjoint(saved, inner_grad_BMM, power * root_dot_grad_B11)
    z_BMM = z_BMM * (2.0 * scale_B11)
    product_grad_BMM *= 2.0 / deviation_BdM.shape[2]
    return torch.baddbmm(outer_grad_BdM @ z_BMM, deviation_BdM, product_grad_BMM)


def _product_adjoint(saved: _Saved, f_grad_Bnn: Tensor, norm_term_B11: Tensor) -> Tensor:
    """Compute the gradient of X X^T or X^T X from the gradient of the last iterate F_N and that of the norm.

    *norm_term_B11* is n times the gradient that n receives outside of the iteration. A norm below
    `SMALLEST_NORM` is a constant and has no gradient.
    """
    matrix_grad_Bnn = steps_adjoint(f_grad_Bnn, saved.ts, saved.fs)
    through_matrix_B11 = (matrix_grad_Bnn * saved.matrix).sum(dim=(1, 2), keepdim=True)
    norm_grad_B11 = (norm_term_B11 - through_matrix_B11) * (saved.norm > SMALLEST_NORM)
    if saved.config.prenorm == "trace":
        matrix_grad_Bnn.diagonal(dim1=1, dim2=2).add_(norm_grad_B11[:, :, 0])
    else:
        matrix_grad_Bnn.addcmul_(saved.matrix, norm_grad_B11)
    return matrix_grad_Bnn / saved.norm
