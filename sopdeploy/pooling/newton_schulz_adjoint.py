"""The adjoint of the Newton-Schulz iteration, for symmetric matrices.

Paper: iSQRT-COV, section 3.2. Letters as in `newton_schulz`; a name with `grad` is the gradient of the
loss for it.

The paper's formulas take six products a step and keep Y_k and Z_k. All iterates are symmetric and
commute, so W_k = Z_k Y_k = 3 I - 2 T_k obeys W_(k+1) = T_k W_k T_k, and F_(k+1) = F_k T_k for F = Y or
F = Z, whichever is asked for; the adjoint of these takes five products a step from T_k and F_k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
