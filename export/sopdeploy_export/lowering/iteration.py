"""Newton-Schulz with one addition per step: Z is kept as -Z / 2, so that no product is scaled.

Algebra: T = (3 I - Z Y) / 2 = 3/2 I + H Y with H = -Z / 2, and H <- T H as Z <- T Z. The factor is a power of
two, so every number is that of `sopdeploy.pooling.newton_schulz` bit for bit; a step costs its products and
one addition of a constant, where the loop scales each product by a pass over the matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LastStep(NamedTuple):
    """The last of the N steps: Y (B, n, n), H = -Z / 2 or `None` for the identity, and T."""

    y: Tensor
    half: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Return Y_N."""
        return self.y @ self.t

    def next_z(self, scale_B11: Tensor) -> Tensor:
        """Return Z_N times *scale_B11*."""
        return self.t * scale_B11 if self.half is None else (self.t @ self.half) * (-2.0 * scale_B11)


def iterate(a_Bnn: Tensor, iterations: int) -> LastStep:
    """Return the last of the N steps on *a_Bnn*; what to compute of it is the caller's choice."""
    constant = 1.5 * torch.eye(a_Bnn.shape[-1], dtype=a_Bnn.dtype, device=a_Bnn.device)
    step = LastStep(a_Bnn, None, constant - 0.5 * a_Bnn)
    for _ in range(iterations - 1):
        half = step.t * -0.5 if step.half is None else step.t @ step.half
        y = step.next_y()
        step = LastStep(y, half, constant + half @ y)
    return step
