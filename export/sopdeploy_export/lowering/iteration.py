"""Newton-Schulz with one addition per step: Z is kept as -Z / 2, so that no product is scaled.

Algebra: T = (3 I - Z Y) / 2 = 3/2 I + H Y with H = -Z / 2, and H <- T H as Z <- T Z. The factor is a power of
two, so every number is that of `sopdeploy.pooling.newton_schulz` bit for bit; a step costs its products and
one addition of a constant, where the loop scales each product by a pass over the matrix.

Matrices in float16, an exporter's wish, are multiplied and added to in float32; only what is kept for the
next step is rounded, and the last product is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sopdeploy.pooling.precision import at_least_float32


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
