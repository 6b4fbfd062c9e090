"""Newton-Schulz iteration: the matrix square root as a fixed number of matrix products.

Paper: iSQRT-COV, Eq. (4): Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, for N steps.

The first step knows that Z is the identity and the last one needs no Z, so N steps take 3N - 3
products (N = 1 takes one). The result is the truncated iterate, not the square root: at N = 5 it is
18 to 42 % away from it on ReLU features, so N belongs to the trained network and never changes.
"""

import torch
from torch import Tensor


def newton_schulz(a_BCC: Tensor, iterations: int) -> Tensor:
    """Return Y_N for pre-normalised matrices *a_BCC* of shape (B, C, C), ||I - A|| < 1.

    *iterations* is N >= 1. float32 stays finite up to N = 15 on singular matrices.
    """
    identity = torch.eye(a_BCC.shape[-1], dtype=a_BCC.dtype, device=a_BCC.device)
    step_BCC = 1.5 * identity - 0.5 * a_BCC
    if iterations == 1:
        return a_BCC @ step_BCC
    y_BCC, z_BCC = a_BCC @ step_BCC, step_BCC
    for _ in range(iterations - 2):
        step_BCC = 1.5 * identity - 0.5 * (z_BCC @ y_BCC)
        y_BCC, z_BCC = y_BCC @ step_BCC, step_BCC @ z_BCC
    step_BCC = 1.5 * identity - 0.5 * (z_BCC @ y_BCC)
    return y_BCC @ step_BCC
