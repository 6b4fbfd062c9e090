"""Poolings of the covariance: iSQRT-COV, MPN-COV and the log-Euclidean one of DeepO2P.

Papers: iSQRT-COV, section 3, and its table of post-compensations; fast-MPN-COV's ResNets and VGG-D use it
with d = 256 and N = 5, GSoP-Net2's released code with N = 3. Li et al., "Is Second-order Information
Helpful for Large-scale Visual Recognition?" (MPN-COV, ICCV 2017), Eqs. (3) to (5); Ionescu et al., "Matrix
Backpropagation ..." (DeepO2P, ICCV 2015).
Letters: B images, d channels, H height, W width; Sigma = U diag(l) U^T.
"""

from typing import Annotated, ClassVar, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.config import Count, Positive
from sopdeploy.layers.covariance import (
    centered_and_scaled,
    covariance,
    scaled,
    upper_triangle_indices,
)
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import PoolingConfig, ReducedPooling
from sopdeploy.layers.spectral import NO_EIGEN_FORM, Logarithm, Power, spectral

Width = Count | None


class ISqrtPooling(ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of the root of their covariance."""

    def __init__(self, config: "ISqrtPoolingConfig", channels: int) -> None:
        super().__init__(channels, config.width, linear=config.reduction == "linear")
        options = config.newton_schulz(compensate=config.compensation == "norm", centered=config.centered)
        self.root = ISqrtCov(self.channels, options)
        self.out_features = self.root.out_features
        self.batch_norm: nn.Module = nn.Identity()
        if config.compensation == "batch_norm":
            self.batch_norm = nn.BatchNorm1d(self.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vector (B, d (d + 1) / 2); `isqrt_cov` converts half-precision maps to float32."""
        return self.batch_norm(self.root(self.reduce(features)))


class ISqrtPoolingConfig(PoolingConfig, NewtonSchulzOptions):
    """`width` is d (`None`: all channels); `compensation` reverts the prenormalization.

    It multiplies by the root of the norm ("norm"), applies batch norm to the vector ("batch_norm", a percent
    worse in the paper), or does nothing ("none", which the paper could not train). `reduction` to d channels
    is the papers' convolution with batch norm and ReLU ("normalized"), or the convolution alone ("linear").
    Without `centered` the root is that of the second moments X X^T / M.
    """

    layer = ISqrtPooling
    kind: Literal["isqrt"] = "isqrt"
    width: Width = 256
    compensation: Literal["norm", "batch_norm", "none"] = "norm"
    reduction: Literal["normalized", "linear"] = "normalized"
    centered: bool = True


class EigenPooling(ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of f(covariance)."""

    not_exportable = NO_EIGEN_FORM
    triangle: Tensor

    def __init__(self, config: "MpnCovConfig | LogEuclideanConfig", channels: int) -> None:
        super().__init__(channels, config.width)
        self.config, self.function = config, config.function()
        self.out_features = self.channels * (self.channels + 1) // 2
        self.register_buffer("triangle", upper_triangle_indices(self.channels), persistent=False)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the triangle (B, d (d + 1) / 2) of f(covariance) of a map (B, d, H, W)."""
        x_BdM = centered_and_scaled(features) if self.config.centered else scaled(features)
        value_Bdd = spectral(covariance(x_BdM), self.function)
        return value_Bdd.flatten(start_dim=1).index_select(1, self.triangle)


class MpnCovConfig(PoolingConfig):
    """MPN-COV; `power` is alpha."""

    layer = EigenPooling
    kind: Literal["mpncov"] = "mpncov"
    width: Width = 256
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    centered: ClassVar[bool] = True

    def function(self) -> Power:
        """Return f, the function of the eigenvalues."""
        return Power(self.power)


class LogEuclideanConfig(PoolingConfig):
    """DeepO2P; `eps` is added to the eigenvalues, because the logarithm requires positive ones.

    DeepO2P neither centers nor reduces channels: `centered=false`, `width=null`. By default the covariance is
    that of all other poolings, as in the MPN-COV paper's comparison with the log-Euclidean metric.
    """

    layer = EigenPooling
    kind: Literal["deepo2p"] = "deepo2p"
    width: Width = 256
    eps: Positive = 1e-3
    centered: bool = True

    def function(self) -> Logarithm:
        """Return f, the function of the eigenvalues."""
        return Logarithm(self.eps)
