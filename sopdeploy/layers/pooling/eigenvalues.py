"""Poolings by the eigenvalues of the covariance: MPN-COV and the log-Euclidean one of DeepO2P.

Papers: Li et al., "Is Second-order Information Helpful for Large-scale Visual Recognition?" (MPN-COV,
ICCV 2017), Eqs. (3) to (5); Ionescu et al., "Matrix Backpropagation ..." (DeepO2P, ICCV 2015).
Letters: B images, d channels, H height, W width; Sigma = U diag(l) U^T.
"""

from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from sopdeploy.layers.covariance import (
    centered_and_scaled,
    covariance,
    frobenius_norm,
    upper_triangle_indices,
)
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, ReducedPooling
from sopdeploy.layers.pooling.bilinear import bilinear
from sopdeploy.layers.spectral import (
    NO_EIGEN_FORM,
    MatrixRootConfig,
    Spectral,
    logarithm,
    power,
    spectral,
    square_root,
)

SMALLEST = 1e-12  # lower bound of divisors
Width = Annotated[int, pydantic.Field(ge=1)] | None


class MpnCovConfig(PoolingConfig):
    """MPN-COV; `power` is alpha; `normalise` divides by the largest l^alpha or by the Frobenius norm."""

    kind: Literal["mpncov"] = "mpncov"
    width: Width = 256
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    normalise: Literal["none", "M-l2", "M-Fro"] = "none"

    def build(self, channels: int) -> "EigenPooling":
        """Build the layer."""
        return EigenPooling(channels, self.width, power(self.power), self.normalise)


class LogEuclideanConfig(PoolingConfig):
    """DeepO2P; `eps` is added to the eigenvalues, because the logarithm requires positive ones.

    DeepO2P does not center; here the covariance is that of all other poolings, as in the MPN-COV paper's
    comparison with the log-Euclidean metric.
    """

    kind: Literal["deepo2p"] = "deepo2p"
    width: Width = 256
    eps: Annotated[float, pydantic.Field(gt=0)] = 1e-3

    def build(self, channels: int) -> "EigenPooling":
        """Build the layer."""
        return EigenPooling(channels, self.width, logarithm(self.eps), "none")


class EigenPooling(ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of f(covariance)."""

    not_exportable = NO_EIGEN_FORM
    triangle: Tensor

    def __init__(
        self,
        channels: int,
        width: int | None,
        function: Spectral,
        normalise: Literal["none", "M-l2", "M-Fro"],
    ) -> None:
        super().__init__(channels, width)
        self.function = function
        self.normalise = normalise
        self.out_features = self.channels * (self.channels + 1) // 2
        self.register_buffer("triangle", upper_triangle_indices(self.channels), persistent=False)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the triangle."""
        value_Bdd, lambda_Bd = spectral(covariance(centered_and_scaled(features)), self.function)
        if self.normalise == "M-l2":
            largest_B1 = self.function.value(lambda_Bd)[:, -1:]
            value_Bdd = value_Bdd / largest_B1.clamp_min(SMALLEST)[:, :, None]
        elif self.normalise == "M-Fro":
            value_Bdd = value_Bdd / frobenius_norm(value_Bdd).clamp_min(SMALLEST)
        return value_Bdd.flatten(start_dim=1).index_select(1, self.triangle)


class GaussianConfig(PoolingConfig, MatrixRootConfig):
    """G2DeNet; the paper's matrix square root is exact."""

    kind: Literal["g2denet"] = "g2denet"

    def build(self, channels: int) -> GlobalPooling:
        """Build the layer; it has no weights."""
        return GaussianEmbedding(self, channels)


class GaussianEmbedding(GlobalPooling):
    """Pool (B, C, H, W) maps to the embedded Gaussian (B, (C + 1)^2)."""

    def __init__(self, config: GaussianConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.not_exportable = config.not_exportable
        self.out_features = (channels + 1) ** 2

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector; Sigma + mu mu^T is X X^T / M."""
        mean_B1C = features.mean(dim=(2, 3))[:, None, :]
        left_BDC = torch.cat([bilinear(features), mean_B1C], dim=1)
        right_BD1 = F.pad(mean_B1C, (0, 1), value=1.0).transpose(1, 2)
        embedded_BDD = torch.cat([left_BDC, right_BD1], dim=2)
        return square_root(embedded_BDD, self.config).flatten(start_dim=1)
