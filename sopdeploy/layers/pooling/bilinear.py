"""Bilinear poolings: B-CNN, improved B-CNN and the Gaussian embedding of G2DeNet.

Papers: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition" (ICCV 2015); Lin
and Maji, "Improved Bilinear Pooling with CNNs" (BMVC 2017); Wang et al., "G2DeNet: Global
Gaussian Distribution Embedding Network" (CVPR 2017). Letters: B images, C channels, M
positions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sopdeploy.layers.covariance import covariance
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_signed_root
from sopdeploy.layers.pooling.covariance import NO_EIGEN_FORM, root_of_eigenvalues, spectral


def second_moments(features: Tensor) -> Tensor:
    """Compute X X^T / M (B, C, C) of *features* (B, C, H, W), the covariance without centering."""
    x_BCM = features.flatten(start_dim=2)
    return covariance(x_BCM * (1.0 / math.sqrt(x_BCM.shape[2])))


class Bilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to the signed square root of X X^T / M, a vector (B, C^2) of unit length."""

    def __init__(self, _config: PoolingConfig, channels: int) -> None:
        super().__init__()
        self.out_features = channels**2

    def matrix(self, features: Tensor) -> Tensor:
        """Compute X X^T / M (B, C, C) of *features* (B, C, H, W)."""
        return second_moments(features)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the (B, C^2) vector of *features* (B, C, H, W)."""
        return unit_signed_root(self.matrix(features).flatten(start_dim=1))


class BilinearConfig(PoolingConfig):
    """Options of B-CNN: none."""

    layer = Bilinear
    kind: Literal["bcnn"] = "bcnn"


class ImprovedBilinear(Bilinear):
    """Improved B-CNN: `Bilinear` of the matrix square root of X X^T / M."""

    not_exportable = NO_EIGEN_FORM

    def matrix(self, features: Tensor) -> Tensor:
        """Compute the square root (B, C, C) of X X^T / M."""
        return spectral(super().matrix(features), root_of_eigenvalues)


class ImprovedBilinearConfig(PoolingConfig):
    """Options of improved B-CNN: none."""

    layer = ImprovedBilinear
    kind: Literal["improved-bcnn"] = "improved-bcnn"


class GaussianEmbedding(GlobalPooling):
    """Pool (B, C, H, W) maps to G2DeNet's embedding of a Gaussian distribution, (B, (C + 1)^2)."""

    not_exportable = NO_EIGEN_FORM

    def __init__(self, _config: PoolingConfig, channels: int) -> None:
        super().__init__()
        self.out_features = (channels + 1) ** 2

    def pool(self, features: Tensor) -> Tensor:
        """Compute the square root of [[Sigma + mu mu^T, mu], [mu^T, 1]] as a vector (B, (C + 1)^2).

        Sigma + mu mu^T is X X^T / M; D is C + 1.
        """
        mean_BC = features.mean(dim=(2, 3))
        upper_BCD = torch.cat([second_moments(features), mean_BC.unsqueeze(2)], dim=2)
        last_row_BD = F.pad(mean_BC, (0, 1), value=1.0)  # [mu^T, 1]
        embedded_BDD = torch.cat([upper_BCD, last_row_BD.unsqueeze(1)], dim=1)
        return spectral(embedded_BDD, root_of_eigenvalues).flatten(start_dim=1)


class GaussianConfig(PoolingConfig):
    """Options of G2DeNet: none."""

    layer = GaussianEmbedding
    kind: Literal["g2denet"] = "g2denet"
