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
from collections.abc import Iterator, Sequence
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


def steps_adjoint(f_grad_BCC: Tensor, ts: Sequence[Tensor], fs: Sequence[Tensor | None]) -> Tensor:
    """Return the gradient (B, C, C) for the matrix that N steps were run on, given that for F_N.

    *f_grad_BCC* is symmetric. *ts* are T_0 .. T_(N-1), *fs* are F_0 .. F_(N-1): F_0 is the matrix
    itself where F is Y, and `None`, the identity, where F is Z.
    """
    f_grad_BCC, t_grad_BCC = factor_gradients(f_grad_BCC, fs[-1], ts[-1])
    w_grad_BCC = -0.25 * (t_grad_BCC + t_grad_BCC.transpose(1, 2))
    for t_BCC, f_BCC in zip(reversed(ts[:-1]), reversed(fs[:-1]), strict=True):
        f_grad_BCC, t_grad_BCC = factor_gradients(f_grad_BCC, f_BCC, t_BCC)
        w_grad_BCC = w_adjoint(w_grad_BCC, t_grad_BCC, t_BCC)
    if fs[0] is None:
        return w_grad_BCC
    return w_grad_BCC + 0.5 * (f_grad_BCC + f_grad_BCC.transpose(1, 2))


def factor_gradients(f_grad_BCC: Tensor, f_BCC: Tensor | None, t_BCC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients for F_k and for T, given that for F_(k+1) = F_k T."""
    if f_BCC is None:
        return f_grad_BCC, f_grad_BCC
    return f_grad_BCC @ t_BCC, f_BCC @ f_grad_BCC


def w_adjoint(w_grad_BCC: Tensor, t_grad_BCC: Tensor, t_BCC: Tensor) -> Tensor:
    """Return the gradient for W_k, given those for W_(k+1) = T W_k T and, from F, for T.

    T = (3 I - W_k) / 2, so W_(k+1) hands T the gradient Q W_k + (Q W_k)^T with Q = W_grad T and
    Q W_k = 3 Q - 2 Q T.
    """
    q_BCC = w_grad_BCC @ t_BCC
    half_BCC = torch.baddbmm(t_grad_BCC, q_BCC, t_BCC, beta=0.25, alpha=-1.0).add_(q_BCC, alpha=1.5)
    return torch.baddbmm(half_BCC, t_BCC, q_BCC, beta=-1.0).sub_(half_BCC.transpose(1, 2))
