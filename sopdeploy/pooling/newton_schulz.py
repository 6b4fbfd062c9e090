"""Newton-Schulz iteration: the matrix square root as a fixed number of matrix products.

Paper: iSQRT-COV, Eq. (4): Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, for N steps.
Letters: B matrices of C rows and columns.

The first step knows that Z is the identity and the last one needs only one of Y and Z, so N steps
take 3N - 3 products (N = 1 takes one for Y and none for Z). The result is the truncated iterate, not
the square root: at N = 5 it is 18 to 42 % away from it on ReLU features, so N belongs to the trained
network and never changes.

Matrices in float16, an exporter's wish, are multiplied in float32: only what is stored is rounded.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One step: Y_k and Z_k (B, C, C), and the T_k that multiplies both; Z_0, the identity, is `None`."""

    y: Tensor
    z: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Return Y_(k+1)."""
        return product(self.y, self.t)

    def next_z(self) -> Tensor:
        """Return Z_(k+1)."""
        return self.t if self.z is None else product(self.t, self.z)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return *left* @ *right*, of float16 matrices by a product in float32."""
    if left.dtype != torch.float16:
        return left @ right
    return (left.float() @ right.float()).half()


def next_t(identity: Tensor, z_BCC: Tensor, y_BCC: Tensor) -> Tensor:
    """Return T = (3 I - Z Y) / 2."""
    if y_BCC.dtype != torch.float16:
        return torch.baddbmm(identity, z_BCC, y_BCC, beta=1.5, alpha=-0.5)
    return (1.5 * identity.float() - 0.5 * (z_BCC.float() @ y_BCC.float())).half()


def steps(a_BCC: Tensor, iterations: int) -> Iterator[Step]:
    """Yield the N steps on *a_BCC*; what to compute of the last one is the caller's choice."""
    identity = torch.eye(a_BCC.shape[-1], dtype=a_BCC.dtype, device=a_BCC.device)
    step = Step(a_BCC, None, 1.5 * identity - 0.5 * a_BCC)
    yield step
    for _ in range(iterations - 1):
        y_BCC, z_BCC = step.next_y(), step.next_z()
        step = Step(y_BCC, z_BCC, next_t(identity, z_BCC, y_BCC))
        yield step


def last_step(a_BCC: Tensor, iterations: int) -> Step:
    """Return the last of the N steps; the others are forgotten on the way."""
    return deque(steps(a_BCC, iterations), maxlen=1).pop()


def newton_schulz(a_BCC: Tensor, iterations: int) -> Tensor:
    """Return Y_N, near A^(1/2), for pre-normalised matrices *a_BCC*: symmetric, ||I - A|| < 1.

    *iterations* is N >= 1. float32 stays finite up to N = 15 on singular matrices.
    """
    return last_step(a_BCC, iterations).next_y()
