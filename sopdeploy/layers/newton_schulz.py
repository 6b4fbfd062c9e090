"""Newton-Schulz iteration: the matrix square root as a fixed number of matrix products.

Paper: iSQRT-COV, Eq. (4): Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, for N steps.
Shapes: B matrices of C rows and columns.

The first step uses Z = I and the last one needs only one of Y and Z, so N steps take 3N - 3 products (N = 1
takes one for Y and none for Z). The result is the truncated iterate, not the square root: at N = 5 it differs
from the root by 18 to 42 % on ReLU features. N is therefore part of the trained network and never changes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from sopdeploy.config import StrictModel

MAX_ITERATIONS = 15  # in float32 the root of a singular matrix is then still finite
Iterations = Annotated[int, pydantic.Field(ge=1, le=MAX_ITERATIONS)]
Prenorm = Literal["trace", "frobenius"]


class NewtonSchulzOptions(StrictModel):
    """Options of iSQRT-COV: `iterations` is N, `prenorm` the norm that divides the covariance.

    N is 5 in the papers and in fast-MPN-COV, 3 in the released GSoP-Net2 and GM-SOP.
    """

    iterations: Iterations = 5
    prenorm: Prenorm = "trace"

    def newton_schulz(self, *, compensate: bool = True, centered: bool = True) -> "NewtonSchulzConfig":
        """Build the configuration of the matrix square root."""
        return NewtonSchulzConfig(
            iterations=self.iterations, prenorm=self.prenorm, compensate=compensate, centered=centered
        )


class NewtonSchulzConfig(NewtonSchulzOptions):
    """Options of the matrix square root of a covariance.

    `compensate` multiplies the root by the square root of the norm after the iteration. Without `centered`
    the root is that of X X^T / M.
    """

    compensate: bool = True
    centered: bool = True


class Step(NamedTuple):
    """One step: Y_k and Z_k (B, C, C), and T_k, which multiplies both; Z_0, the identity, is `None`."""

    y: Tensor
    z: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Compute Y_(k+1) = Y_k T_k, (B, C, C)."""
        return self.y @ self.t

    def next_z(self) -> Tensor:
        """Compute Z_(k+1) = T_k Z_k, (B, C, C)."""
        return self.t if self.z is None else self.t @ self.z


def steps(a_BCC: Tensor, iterations: int) -> Iterator[Step]:
    """Yield the N steps on *a_BCC*; the caller computes Y_N or Z_N from the last one."""
    identity = torch.eye(a_BCC.shape[-1], dtype=a_BCC.dtype, device=a_BCC.device)
    step = Step(a_BCC, None, 1.5 * identity - 0.5 * a_BCC)
    yield step
    for _ in range(iterations - 1):
        y_BCC, z_BCC = step.next_y(), step.next_z()
        step = Step(y_BCC, z_BCC, torch.baddbmm(identity, z_BCC, y_BCC, beta=1.5, alpha=-0.5))
        yield step


def last_step(a_BCC: Tensor, iterations: int) -> Step:
    """Compute the last of the N `steps`."""
    for step in steps(a_BCC, iterations):  # noqa: B007 - the last one
        pass
    return step


def newton_schulz(a_BCC: Tensor, iterations: int) -> Tensor:
    """Compute Y_N, near A^(1/2), of prenormalized matrices *a_BCC*: symmetric, ||I - A|| < 1.

    *iterations* is N >= 1. In float32 the result is finite up to N = 15, for singular matrices too.
    """
    return last_step(a_BCC, iterations).next_y()


def steps_adjoint(f_grad_BCC: Tensor, ts: Sequence[Tensor], fs: Sequence[Tensor | None]) -> Tensor:
    """Backpropagate through N steps: from the gradient of F_N to that of the input matrix, both (B, C, C).

    F is Y or Z. *f_grad_BCC* is symmetric. *ts* are T_0 .. T_(N-1), *fs* are F_0 .. F_(N-1): F_0 is the input
    matrix where F is Y, and `None`, the identity, where F is Z.

    With W_k = Z_k Y_k, W_(k+1) = T W_k T and T = (3 I - W_k) / 2, the gradient of T receives
    Q W_k + (Q W_k)^T from W_(k+1), where Q = W_grad T and Q W_k = 3 Q - 2 Q T. So the gradient of W_k is
    T Q - H - H^T, where H = T_grad / 4 + Q W_k / 2.
    """
    f_grad_BCC, t_grad_BCC = _factor_gradients(f_grad_BCC, fs[-1], ts[-1])
    w_grad_BCC = -0.25 * (t_grad_BCC + t_grad_BCC.transpose(1, 2))
    for t_BCC, f_BCC in zip(reversed(ts[:-1]), reversed(fs[:-1]), strict=True):
        f_grad_BCC, t_grad_BCC = _factor_gradients(f_grad_BCC, f_BCC, t_BCC)
        q_BCC = w_grad_BCC @ t_BCC
        h_BCC = torch.baddbmm(t_grad_BCC, q_BCC, t_BCC, beta=0.25, alpha=-1.0).add_(q_BCC, alpha=1.5)
        w_grad_BCC = torch.baddbmm(h_BCC, t_BCC, q_BCC, beta=-1.0).sub_(h_BCC.transpose(1, 2))
    if fs[0] is None:
        return w_grad_BCC
    return w_grad_BCC + 0.5 * (f_grad_BCC + f_grad_BCC.transpose(1, 2))


def _factor_gradients(f_grad_BCC: Tensor, f_BCC: Tensor | None, t_BCC: Tensor) -> tuple[Tensor, Tensor]:
    """Split the gradient of F_(k+1) = F_k T into those of F_k and T."""
    if f_BCC is None:
        return f_grad_BCC, f_grad_BCC
    return f_grad_BCC @ t_BCC, f_BCC @ f_grad_BCC
