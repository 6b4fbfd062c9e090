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
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig, Step, last_step, steps, steps_adjoint

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
    """Compute A or G: center the map, compute X X^T or X^T X, divide it by its trace or Frobenius norm.

    Both products have the same trace and the same Frobenius norm.
    """
    map_BdHW = at_least_float32(features_BdHW)
    x_BdM = centered_and_scaled(map_BdHW) if config.centered else scaled(map_BdHW)
    use_gram = gram_is_cheaper(x_BdM.shape[1], x_BdM.shape[2], config.iterations)
    matrix_Bnn = covariance(x_BdM.transpose(1, 2) if use_gram else x_BdM)
    norm_B11 = covariance_trace(matrix_Bnn) if config.prenorm == "trace" else frobenius_norm(matrix_Bnn)
    norm_B11 = norm_B11.clamp_min(SMALLEST_NORM)
    return Prenormalized(x_BdM, norm_B11, matrix_Bnn / norm_B11, use_gram)


def covariance_root(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the root (B, d, d) of the covariance of a map by operations that autograd can differentiate."""
    start = prenormalize(features_BdHW, config)
    return _root(start, last_step(start.matrix, config.iterations), config)


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
        """Compute the gradient (B, d, H, W) of the map; second derivatives go through autograd.

        The root is n^p Y_N if the iteration runs on A, and n^p X Z_N X^T if it runs on G. Through n^p, n
        receives the gradient p <root, its gradient> / n.
        """
        config: NewtonSchulzConfig = ctx.config
        features_BdHW, triangle, vector, norm_B11, matrix_Bnn, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = isqrt_vector(features_BdHW, triangle, config)
            return torch.autograd.grad(again, features_BdHW, grad, create_graph=True)[0], None, None
        ts = factors[: config.iterations]
        fs = [None if ctx.use_gram else matrix_Bnn, *factors[config.iterations :]]

        channels = features_BdHW.shape[1]
        upper = grad.new_zeros(len(grad), channels * channels).index_add_(1, triangle, grad)
        upper_Bdd = upper.view(-1, channels, channels)
        root_grad_Bdd = (upper_Bdd + upper_Bdd.transpose(1, 2)).mul_(0.5)
        root_dot_grad_B11 = (grad * vector).sum(dim=1)[:, None, None]

        x_BdM = deviations(features_BdHW, config)  # not saved: it is as large as the map
        positions = x_BdM.shape[2]
        if ctx.use_gram:
            power = -0.5 if config.compensate else -1.0
            scale_B11 = norm_B11.pow(power) / positions
            outer_grad_BdM = root_grad_Bdd @ x_BdM
            f_grad_Bnn = (x_BdM.transpose(1, 2) @ outer_grad_BdM) * scale_B11
            norm_term_B11 = power * root_dot_grad_B11
        elif config.compensate:
            f_grad_Bnn, norm_term_B11 = root_grad_Bdd * norm_B11.sqrt(), 0.5 * root_dot_grad_B11
        else:
            f_grad_Bnn, norm_term_B11 = root_grad_Bdd, torch.zeros_like(root_dot_grad_B11)

        matrix_grad_Bnn = steps_adjoint(f_grad_Bnn, ts, fs)
        product_grad_Bnn = _prenorm_adjoint(matrix_grad_Bnn, matrix_Bnn, norm_B11, norm_term_B11, config)
        product_grad_Bnn *= 2.0 / positions
        if ctx.use_gram:
            z_BMM = ts[-1] if fs[-1] is None else ts[-1] @ fs[-1]
            outer_part_BdM = outer_grad_BdM @ (z_BMM * (2.0 * scale_B11))
            gradient_BdM = torch.baddbmm(outer_part_BdM, x_BdM, product_grad_Bnn)
        else:
            gradient_BdM = product_grad_Bnn @ x_BdM
        return gradient_BdM.view_as(features_BdHW).to(features_BdHW.dtype), None, None


def _prenorm_adjoint(
    matrix_grad_Bnn: Tensor,
    matrix_Bnn: Tensor,
    norm_B11: Tensor,
    norm_term_B11: Tensor,
    config: NewtonSchulzConfig,
) -> Tensor:
    """Compute the gradient of the product P = X X^T or X^T X from that of *matrix_Bnn*, P / n.

    *norm_term_B11* is n times the gradient that n receives outside of the iteration. A norm below
    `SMALLEST_NORM` is a constant and has no gradient. Modifies *matrix_grad_Bnn*.
    """
    through_matrix_B11 = (matrix_grad_Bnn * matrix_Bnn).sum(dim=(1, 2), keepdim=True)
    norm_grad_B11 = (norm_term_B11 - through_matrix_B11) * (norm_B11 > SMALLEST_NORM)
    if config.prenorm == "trace":
        matrix_grad_Bnn.diagonal(dim1=1, dim2=2).add_(norm_grad_B11[:, :, 0])
    else:
        matrix_grad_Bnn.addcmul_(matrix_Bnn, norm_grad_B11)
    return matrix_grad_Bnn / norm_B11
