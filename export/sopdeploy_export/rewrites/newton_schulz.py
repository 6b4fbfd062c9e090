"""Rule: compute the matrix square root of iSQRT-COV with fewer operations.

The letters are those of `sopdeploy.layers.isqrt_cov`; X is centered but not scaled, and n is the norm of X
X^T.

- A = (X X^T / M) / (n / M) = X X^T / n. The 1 / M cancels, and the root is Y_N sqrt(n / M).
- trace(X X^T) = trace(X^T X) is the sum of squares of X. The smaller of the two products is computed, and its
  diagonal is read by a product with the identity that the iteration needs anyway.
- The first step uses Z = I and the last one needs only one of Y and Z: 3N - 3 products instead of 3N.
- Every iterate is a polynomial in A, so Y_N(X X^T / n) = X Z_N(X^T X / n) X^T / n. This takes fewer
  products if M < d (Gram Newton-Schulz, known from the Muon optimizer: Dao-AILab, 2026).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.covariance import (
    at_least_float32,
    covariance_trace,
    frobenius_norm,
    upper_triangle_indices,
)
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov, as_stored, gram_is_cheaper
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.context import RewriteContext

CENTERING = "centering by mean"
MIN_SIZE = 3  # replacing smaller centering constants saves nothing
ROUNDING = 16 * float(np.finfo(np.float32).eps)
NAME = "Newton-Schulz in 3N-3 products"
TRACE = "trace without a diagonal"
GRAM = "iteration in the Gram domain"


class Centering(NamedTuple):
    """The matrix alpha I + beta 11^T with *size* rows."""

    alpha: float
    beta: float
    size: int

    @property
    def removes_the_mean(self) -> bool:
        """Whether alpha + n beta is 0, up to float32 rounding."""
        return abs(self.alpha + self.size * self.beta) <= ROUNDING * abs(self.alpha)


class LastStep(NamedTuple):
    """The last of N steps: Y, H = -Z / 2 (`None` if Z = I) and T = (3 I - Z Y) / 2, all (B, n, n)."""

    y: Tensor
    half: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Compute Y_N (B, n, n), the result of the iteration on Y."""
        return product(self.y, self.t)

    def next_z(self, scale_B11: Tensor) -> Tensor:
        """Compute Z_N (B, n, n), the result of the iteration on Z, times *scale_B11*."""
        if self.half is None:
            return at_least_float32(self.t) * scale_B11
        return product(self.t, self.half) * (-2.0 * scale_B11)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in float32 or float64, also matrices that are stored in float16."""
    return at_least_float32(left) @ at_least_float32(right)


def iterate(a_Bnn: Tensor, iterations: int) -> LastStep:
    """Run N - 1 steps on *a_Bnn* and return the last step, from which the caller computes Y_N or Z_N.

    Matrices are stored in the dtype of *a_Bnn* and multiplied in float32 or float64.
    """
    dtype, wide = a_Bnn.dtype, at_least_float32(a_Bnn)
    constant = 1.5 * torch.eye(a_Bnn.shape[-1], dtype=wide.dtype, device=a_Bnn.device)

    def stored(matrix: Tensor) -> Tensor:
        return matrix if matrix.dtype == dtype else matrix.to(dtype)

    step = LastStep(a_Bnn, None, stored(constant - 0.5 * wide))
    for _ in range(iterations - 1):
        half = step.t * -0.5 if step.half is None else stored(product(step.t, step.half))
        y = stored(step.next_y())
        step = LastStep(y, half, stored(constant + product(half, y)))
    return step


class Start(NamedTuple):
    """The input of the iteration: the matrix, its norm n (B, 1, 1), and whether it is X^T X."""

    matrix: Tensor
    norm: Tensor
    use_gram: bool

    def inner_scale(self, positions: int, *, compensate: bool) -> Tensor:
        """Compute the factor of X Z X^T that gives the root: 1 / sqrt(n M), or 1 / n."""
        return (self.norm * positions).sqrt().reciprocal() if compensate else self.norm.reciprocal()

    def outer_scale(self, positions: int) -> Tensor:
        """Compute sqrt(n / M), the factor of Y_N that restores the norm."""
        return (self.norm * (1.0 / positions)).sqrt()


def start(x_BMd: Tensor, config: NewtonSchulzConfig) -> Start:
    """Multiply centered maps *x_BMd* with themselves and divide by the norm."""
    positions, channels = x_BMd.shape[1], x_BMd.shape[2]
    use_gram = _uses_gram(config, channels, positions)
    transposed = x_BMd.transpose(1, 2)
    matrix = x_BMd @ transposed if use_gram else transposed @ x_BMd
    norm = covariance_trace(matrix) if config.prenorm == "trace" else frobenius_norm(matrix)
    norm = norm.clamp_min(SMALLEST_NORM * positions)
    return Start(as_stored(matrix / norm, config), norm, use_gram)


def _uses_gram(config: NewtonSchulzConfig, channels: int, positions: int) -> bool:
    # rounding to float16 gives a Gram matrix negative eigenvalues
    return config.stored == "float32" and gram_is_cheaper(channels, positions, config.iterations)


class LoweredRoot(nn.Module, ExportHints):
    """`ISqrtCov` in fewer operations: maps (B, d, H, W) to upper triangles."""

    keep_float32 = True
    computes_roots = True
    rewrite_rules = ("post_compensation",)
    triangle: Tensor

    def __init__(self, before: ISqrtCov) -> None:
        super().__init__()
        self.config = before.config
        self.register_buffer("triangle", before.triangle)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle, row by row."""
        return self.matrix(features_BdHW).flatten(start_dim=1).index_select(1, self.triangle)

    def roots(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps and their roots (B, d, d), for the parity checks."""
        return features_BdHW, self.matrix(features_BdHW)

    def matrix(self, features_BdHW: Tensor) -> Tensor:
        """Compute the root (B, d, d)."""
        root_Bdd, scale_B11 = self.root(features_BdHW)
        return root_Bdd if scale_B11 is None else root_Bdd * scale_B11

    def root(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the root (B, d, d) and the scale (B, 1, 1) that the caller must apply; None if applied."""
        x_BdM = at_least_float32(features_BdHW).flatten(start_dim=2)
        x_BdM = x_BdM - x_BdM.mean(dim=2, keepdim=True)
        positions, compensate = x_BdM.shape[2], self.config.compensate
        begin = start(x_BdM.transpose(1, 2), self.config)
        last = iterate(begin.matrix, self.config.iterations)
        if begin.use_gram:
            inner = last.next_z(begin.inner_scale(positions, compensate=compensate))
            return x_BdM @ inner @ x_BdM.transpose(1, 2), None
        return last.next_y(), begin.outer_scale(positions) if compensate else None


def apply(context: RewriteContext, where: str, part: ISqrtCov) -> None:
    """Replace one root; raise `LoweringError` if its triangle is not the upper one."""
    check_triangle(where, part)
    context.replace(NAME, where, LoweredRoot)
    shape = context.activations[where].inputs[0].shape
    report_root(context, where, part.config, shape[1], math.prod(shape[2:]))


def check_triangle(where: str, part: ISqrtCov) -> None:
    """Raise `LoweringError` unless the indices of *part* are the upper triangle, row by row."""
    if not torch.equal(part.triangle, upper_triangle_indices(part.width)):
        raise LoweringError(
            f"{where}: its indices are not the upper triangle of {part.width} channels, row by row"
            "; --no-lowering exports without rewrite rules"
        )


def report_root(
    context: RewriteContext, where: str, config: NewtonSchulzConfig, channels: int, positions: int
) -> None:
    """Report the rules that apply to one root, with the numbers that were checked."""
    if positions >= MIN_SIZE and Centering(1 / positions, -1 / positions**2, positions).removes_the_mean:
        context.report(
            CENTERING,
            where,
            f"alpha + M beta = 0 for I/M - 11^T/M^2, M = {positions}",
            f"{positions} additions per channel instead of {positions**2} multiply-adds",
        )
    if config.prenorm == "trace":
        context.report(
            TRACE,
            where,
            f"trace(X X^T) = trace(X^T X) = sum of squares of X, {channels} x {positions}",
            f"{min(channels, positions) ** 2} products with the identity; 1/M cancels",
        )
    n = config.iterations
    products = max(1, 3 * n - 3)
    context.report(
        NAME,
        where,
        f"N = {n}, from the checkpoint; Z starts as the identity",
        f"{products} products of {channels} rows instead of {3 * n - 1}",
    )
    if _uses_gram(config, channels, positions):
        gram = products * positions**3 + 2 * channels * positions**2
        context.report(
            GRAM,
            where,
            f"M = {positions} positions, d = {channels} channels; {gram} < {products * channels**3} products",
            f"the same polynomial on {positions} rows instead of {channels}",
        )
