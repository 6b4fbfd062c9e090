"""Rules of the root: centring by mean, trace without a diagonal, 3N - 3 products, the Gram domain.

Letters as in `sopdeploy.layers.isqrt_cov`; X is centered; n is the norm of X X^T.

Algebra. A = (X X^T / M) / (n / M) = X X^T / n: the 1 / M cancels, so no pass over the map scales it, and
the root is Y_N sqrt(n / M). trace(X X^T) is the sum of the squares of X, and the trace of X^T X too: that
product is the smaller of the two, and its diagonal is read by a product with the identity that the
iteration has anyway. The first step knows Z = I and the last computes one of Y and Z: 3N - 3 products where
the loop has 3N. Every iterate is a polynomial in A, so Y_N(X X^T / n) = X Z_N(X^T X / n) X^T / n, which takes
fewer products where M < d (Gram Newton-Schulz; known from the Muon optimizer: Dao-AILab, 2026).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.covariance import (
    at_least_float32,
    covariance_trace,
    frobenius_norm,
    upper_triangle_indices,
)
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov, as_stored, gram_is_cheaper
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.centering import NAME as CENTRING
from sopdeploy_export.rewrites.centering import Centering, recognise, textbook_centring
from sopdeploy_export.rewrites.context import RewriteContext


class LastStep(NamedTuple):
    """The last of the N steps: Y (B, n, n), H = -Z / 2 or `None` for the identity, and T."""

    y: Tensor
    half: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Return Y_N."""
        return product(self.y, self.t)

    def next_z(self, scale_B11: Tensor) -> Tensor:
        """Return Z_N times *scale_B11*."""
        if self.half is None:
            return at_least_float32(self.t) * scale_B11
        return product(self.t, self.half) * (-2.0 * scale_B11)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return *left* @ *right* in float32 at least."""
    return at_least_float32(left) @ at_least_float32(right)


def kept_as(matrix: Tensor, stored: torch.dtype) -> Tensor:
    """Return *matrix* in the type that it is kept in for the next step; no cast where there is none to do."""
    return matrix if matrix.dtype == stored else matrix.to(stored)


def iterate(a_Bnn: Tensor, iterations: int) -> LastStep:
    """Return the last of the N steps on *a_Bnn*, kept in its type; what to compute of it is the caller's."""
    wide, kept = at_least_float32(a_Bnn), a_Bnn.dtype
    constant = 1.5 * torch.eye(a_Bnn.shape[-1], dtype=wide.dtype, device=a_Bnn.device)
    step = LastStep(a_Bnn, None, kept_as(constant - 0.5 * wide, kept))
    for _ in range(iterations - 1):
        half = step.t * -0.5 if step.half is None else kept_as(product(step.t, step.half), kept)
        y = kept_as(step.next_y(), kept)
        step = LastStep(y, half, kept_as(constant + product(half, y), kept))
    return step


NAME = "Newton-Schulz in 3N-3 products"
TRACE = "trace without a diagonal"
GRAM = "iteration in the Gram domain"


def start(x_BMd: Tensor, rule: NewtonSchulzConfig) -> tuple[Tensor, Tensor, bool]:
    """Return the matrix to iterate on, its norm n (B, 1, 1), and whether it is X^T X; *x_BMd* is centred."""
    positions, channels = x_BMd.shape[1], x_BMd.shape[2]
    by_positions = in_gram_domain(rule, channels, positions)
    turned = x_BMd.transpose(1, 2)
    matrix = x_BMd @ turned if by_positions else turned @ x_BMd
    norm = covariance_trace(matrix) if rule.prenorm == "trace" else frobenius_norm(matrix)
    norm = norm.clamp_min(SMALLEST_NORM * positions)
    return as_stored(matrix / norm, rule), norm, by_positions


def in_gram_domain(rule: NewtonSchulzConfig, channels: int, positions: int) -> bool:
    """Say whether the iteration runs on positions: where they are fewer, and in float32 only.

    Rounded to float16, a Gram matrix has negative eigenvalues where there are none.
    """
    return rule.stored == "float32" and gram_is_cheaper(channels, positions, rule.iterations)


def inner_scale(norm: Tensor, positions: int, *, compensate: bool) -> Tensor:
    """Return what X Z X^T is multiplied by to be the root: 1 / sqrt(n M), or 1 / n."""
    return (norm * positions).sqrt().reciprocal() if compensate else norm.reciprocal()


def outer_scale(norm: Tensor, positions: int) -> Tensor:
    """Return sqrt(n / M), which brings the norm back."""
    return (norm * (1.0 / positions)).sqrt()


class LoweredRoot(nn.Module):
    """Feature map (B, d, H, W) in, upper triangle (B, d (d + 1) / 2) out; `ISqrtCov` in fewer operations."""

    triangle: Tensor

    def __init__(self, before: ISqrtCov) -> None:
        super().__init__()
        self.config = before.config
        self.register_buffer("triangle", before.triangle)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Return the triangle, with compensation as the rule says."""
        return self.matrix(features_BdHW).flatten(start_dim=1).index_select(1, self.triangle)

    def matrix(self, features_BdHW: Tensor) -> Tensor:
        """Return the root (B, d, d), with compensation as the rule says."""
        root_Bdd, scale_B11 = self.root(features_BdHW)
        return root_Bdd if scale_B11 is None else root_Bdd * scale_B11

    def roots(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps that roots are taken of, and their roots."""
        return features_BdHW, self.matrix(features_BdHW)

    def root(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the root (B, d, d) and what is left to multiply it by, if anything is."""
        x_BdM = at_least_float32(features_BdHW).flatten(start_dim=2)
        x_BdM = x_BdM - x_BdM.mean(dim=2, keepdim=True)
        positions = x_BdM.shape[2]
        matrix, norm, by_positions = start(x_BdM.transpose(1, 2), self.config)
        last = iterate(matrix, self.config.iterations)
        if by_positions:
            inner = last.next_z(inner_scale(norm, positions, compensate=self.config.compensate))
            return x_BdM @ inner @ x_BdM.transpose(1, 2), None
        return last.next_y(), outer_scale(norm, positions) if self.config.compensate else None


def apply(work: RewriteContext) -> None:
    """Rewrite every root of the network; refuse a triangle that is not the upper one, row by row."""
    for where, part in work.parts(ISqrtCov):
        refuse_other_triangle(where, part)
        work.replace(NAME, where, LoweredRoot)
        shape = work.calls[where].inputs[0].shape
        describe(work, where, part.config, shape[1], math.prod(shape[2:]))


def refuse_other_triangle(where: str, part: ISqrtCov) -> None:
    """Check the actual constant: a transposed triangle has the right numbers in the wrong order."""
    if not torch.equal(part.triangle, upper_triangle_indices(part.width)):
        raise LoweringError(
            f"{where}: its triangle is not the upper one of {part.width} channels, row by row"
        )


def describe(
    work: RewriteContext, where: str, rule: NewtonSchulzConfig, channels: int, positions: int
) -> None:
    """Write down the rules of one root, with the numbers that they were checked on."""
    constant: Centering | None = recognise(textbook_centring(positions))
    if constant is not None and constant.removes_the_mean:
        work.note(
            CENTRING,
            where,
            f"alpha + M beta = 0 for I/M - 11^T/M^2, M = {positions}",
            f"{positions} additions per channel for {positions**2} multiply-adds",
        )
    if rule.prenorm == "trace":
        work.note(
            TRACE,
            where,
            f"trace(X X^T) = trace(X^T X) = sum of squares of X, {channels} x {positions}",
            f"{min(channels, positions) ** 2} products with the identity; 1/M cancels",
        )
    n, naive = rule.iterations, 3 * rule.iterations - 1
    products = max(1, 3 * n - 3)
    work.note(
        NAME,
        where,
        f"N = {n}, from the checkpoint; Z starts as the identity",
        f"{products} products of {channels} rows for {naive}",
    )
    if in_gram_domain(rule, channels, positions):
        gram = products * positions**3 + 2 * channels * positions**2
        work.note(
            GRAM,
            where,
            f"M = {positions} positions, d = {channels} channels; {gram} < {products * channels**3} products",
            f"the same polynomial on {positions} rows for {channels}",
        )
