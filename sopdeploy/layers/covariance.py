"""Covariance pooling: second-order statistics of a feature map.

Paper: Li et al., "Towards Faster Training of Global Covariance Pooling Networks by Iterative
Matrix Square Root Normalization" (iSQRT-COV), Eq. (1): Sigma = X (I - 11^T/M) X^T / M. Letters:
B images, C channels, H height, W width, M = H*W positions.

The covariance is computed by subtracting the mean, then one product. The paper's centering
matrix costs M^2 more operations per channel, and its rounding gives negative traces on constant
maps.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from sopdeploy.errors import ConfigError

_SMALLEST_SQUARE = 1e-30  # keeps the gradient of the square root finite at 0


def deviations(features_BCHW: Tensor) -> Tensor:
    """Flatten a map to (B, C, M) and subtract its mean over positions."""
    x_BCM = features_BCHW.flatten(start_dim=2)
    return x_BCM - x_BCM.mean(dim=2, keepdim=True)


def covariance_factor(features_BCHW: Tensor) -> Tensor:
    """Compute the deviations (B, C, M) of a map divided by sqrt(M).

    Scaling the operand instead of the product keeps the product in range in half precision.
    """
    x_BCM = deviations(features_BCHW)
    return x_BCM.mul_(1.0 / math.sqrt(x_BCM.shape[2]))


def covariance(factor_BCM: Tensor) -> Tensor:
    """Compute the covariance (B, C, C) from its factor."""
    return factor_BCM @ factor_BCM.transpose(1, 2)


def covariance_matrix(features_BCHW: Tensor) -> Tensor:
    """Compute the covariance of the channels of a feature map.

    Args:
        features_BCHW: A feature map (B, C, H, W).

    Returns:
        A symmetric, positive semidefinite matrix (B, C, C) for each image, over its H * W positions.

    Examples:
        >>> sopdeploy.layers.covariance_matrix(torch.rand(2, 64, 7, 7)).shape
        torch.Size([2, 64, 64])
    """
    return covariance(covariance_factor(features_BCHW))


def covariance_trace(cov_BCC: Tensor) -> Tensor:
    """Compute the trace of each matrix as (B, 1, 1), by a product with the identity.

    Runtimes have no operator for the diagonal, and a sum over the squared map would read the
    map once more.
    """
    identity = torch.eye(cov_BCC.shape[-1], dtype=cov_BCC.dtype, device=cov_BCC.device)
    return (cov_BCC * identity).sum(dim=(1, 2), keepdim=True)


def frobenius_norm(cov_BCC: Tensor) -> Tensor:
    """Compute the Frobenius norm of each matrix as (B, 1, 1), with finite gradients for zero matrices."""
    return cov_BCC.square().sum(dim=(1, 2), keepdim=True).clamp_min(_SMALLEST_SQUARE).sqrt()


def upper_triangle_indices(channels: int) -> Tensor:
    """Return the indices of the upper triangle in a flattened (C, C) matrix, row by row.

    int64 of length C (C + 1) / 2, diagonal included; the order of fast-MPN-COV's vector.
    """
    # On the CPU, because this operator is slow on `meta`.
    rows, columns = torch.triu_indices(channels, channels, device="cpu")
    indices: Tensor = rows * channels + columns
    return indices.to(torch.get_default_device())


def check_channels(layer: nn.Module, features_BCHW: Tensor, channels: int) -> None:
    """Raise `ConfigError`, which names the class of *layer*, unless the map has so many *channels*."""
    found = features_BCHW.shape[1]
    if found != channels:
        kind = type(layer).__name__
        raise ConfigError(
            f"{kind}: the feature map has {found} channels, not {channels}; "
            "build the layer with the number of the map"
        )


class TriangleIndices(nn.Module):
    """Mixin for a layer that reads the upper triangle of matrices, by the indices in its buffer `triangle`.

    No checkpoint has them. A layer that was built on the device `meta` therefore computes them
    again when it gets memory, which `to_empty` does not initialize.
    """

    triangle: Tensor

    def register_triangle(self, channels: int) -> None:
        """Add the buffer for matrices of *channels* rows."""
        self._rows = channels
        self.register_buffer("triangle", upper_triangle_indices(channels), persistent=False)

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Convert the tensors, as `to` and `to_empty` do; what comes from `meta` has no values yet."""
        was_meta = self.triangle.is_meta
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        if was_meta and not self.triangle.is_meta:
            self._fill(self.triangle.device)
        return self

    def _fill(self, device: torch.device) -> None:
        with torch.device("cpu"):
            indices = upper_triangle_indices(self._rows)
        self.triangle = indices.to(device)

    def upper_triangle(self, matrices_BCC: Tensor) -> Tensor:
        """Read the upper triangles (B, C (C + 1) / 2) of (B, C, C) matrices, row by row."""
        return matrices_BCC.flatten(start_dim=1).index_select(
            1, self.triangle_for(matrices_BCC)
        )

    def triangle_for(self, values: Tensor) -> Tensor:
        """Return the indices for a layer that computes *values*, also if only its weights left `meta`."""
        if self.triangle.is_meta and not values.is_meta:
            self._fill(values.device)
        return self.triangle


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a half-precision tensor to float32; other tensors stay as they are."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turn autocast off for the device of *x*, so that operations keep the type of their operands.

    If autocast is already off, the context does nothing and adds nothing to an exported
    program.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
