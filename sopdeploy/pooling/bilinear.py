"""Bilinear pooling: B-CNN, its improved form, and the products of features they are made of.

Papers: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition" (ICCV 2015); Lin and Maji,
"Improved Bilinear Pooling with CNNs" (BMVC 2017). Letters: B images, C channels, M positions.
"""

import math
from typing import Literal

from torch import Tensor

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig, signed_root, unit_length
from sopdeploy.pooling.matrix_root import RootConfig, square_root


class BilinearConfig(PoolingConfig):
    """Nothing to choose."""

    kind: Literal["bcnn"] = "bcnn"

    def build(self, channels: int) -> GlobalPooling:
        """Return B-CNN; it has no weights."""
        return Bilinear(channels)


class ImprovedBilinearConfig(PoolingConfig, RootConfig):
    """How the matrix square root is taken; the paper compares an exact root with iterations."""

    kind: Literal["improved-bcnn"] = "improved-bcnn"

    def build(self, channels: int) -> GlobalPooling:
        """Return improved B-CNN; it has no weights."""
        return ImprovedBilinear(self, channels)


class Bilinear(GlobalPooling):
    """Feature map (B, C, H, W) in; signed root of X X^T / M, at unit length (B, C^2), out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = channels * channels

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector."""
        return unit_length(signed_root(bilinear(features).flatten(start_dim=1)))


class ImprovedBilinear(GlobalPooling):
    """Feature map (B, C, H, W) in; the same vector of the matrix square root out."""

    def __init__(self, config: ImprovedBilinearConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.not_exportable = config.not_exportable
        self.out_features = channels * channels

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector."""
        root_BCC = square_root(bilinear(features), self.config)
        return unit_length(signed_root(root_BCC.flatten(start_dim=1)))


def bilinear(features_BCHW: Tensor) -> Tensor:
    """Return X X^T / M as (B, C, C); X is not centred."""
    x_BCM = features_BCHW.flatten(start_dim=2)
    x_BCM = x_BCM * (1.0 / math.sqrt(x_BCM.shape[2]))
    return x_BCM @ x_BCM.transpose(1, 2)
