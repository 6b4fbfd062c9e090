"""Covariance pooling: second-order statistics of a feature map.

Paper: Li et al., "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix
Square Root Normalization" (iSQRT-COV), Eq. (1): Sigma = X (I - 11^T/M) X^T / M.
Letters: B images, C channels, H height, W width, M = H*W positions.

Written as mean subtraction and one product. The paper's centring matrix costs M^2 more per channel,
and on constant maps its rounding gives negative traces; subtracting the mean first cannot.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SMALLEST_SQUARE = 1e-30  # the root's gradient at 0 is infinite, and 0 times that is no number


def centred(features_BCHW: Tensor) -> Tensor:
    """Return the map as (B, C, M), its mean over positions taken away."""
    x_BCM = features_BCHW.flatten(start_dim=2)
    return x_BCM - x_BCM.mean(dim=2, keepdim=True)


def centred_positions(features_BCHW: Tensor) -> Tensor:
    """Return X / sqrt(M), centred over positions, as (B, C, M).

    Scaling the operand instead of the product keeps the product in range in half precision.
    """
    x_BCM = centred(features_BCHW)
    return x_BCM.mul_(1.0 / math.sqrt(x_BCM.shape[2]))


def covariance(centred_BCM: Tensor) -> Tensor:
    """Return the (B, C, C) covariance of what `centred_positions` gave."""
    return centred_BCM @ centred_BCM.transpose(1, 2)


def covariance_trace(cov_BCC: Tensor) -> Tensor:
    """Return the trace of each matrix as (B, 1, 1), by a product with the identity.

    Runtimes take no diagonal, and the sum of squares of the map costs a pass over it.
    """
    identity = torch.eye(cov_BCC.shape[-1], dtype=cov_BCC.dtype, device=cov_BCC.device)
    return (cov_BCC * identity).sum(dim=(1, 2), keepdim=True)


def frobenius_norm(cov_BCC: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix as (B, 1, 1); gradients are finite for zero matrices too."""
    return cov_BCC.square().sum(dim=(1, 2), keepdim=True).clamp_min(SMALLEST_SQUARE).sqrt()


def upper_triangle_indices(channels: int) -> Tensor:
    """Return the positions of the upper triangle, row by row, in a flattened (C, C) matrix.

    int64 of length C (C + 1) / 2, diagonal included; fast-MPN-COV's vector order.
    """
    rows_columns = torch.triu_indices(channels, channels)
    return rows_columns[0] * channels + rows_columns[1]


def at_least_float32(x: Tensor) -> Tensor:
    """Return *x*, a half-precision tensor widened to float32."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operations on the device of *x* keep the type of their operands.

    Where autocast is off it does nothing, so that an exported program holds no trace of it.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
