"""iSQRT-COV as a network's global pooling: dimension reduction, covariance, iterated root, triangle.

Paper: iSQRT-COV, section 3; its table of post-compensations. fast-MPN-COV's own ResNets and VGG-D carry
this layer with d = 256 and N = 5, GSoP-Net2's released code with N = 3.
"""

from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.newton_schulz import NewtonSchulzOptions
from sopdeploy.layers.pooling.base import PoolingConfig, ReducedPooling


class ISqrtPoolingConfig(PoolingConfig, NewtonSchulzOptions):
    """`width` is d (`None`: all channels); `compensation` reverts the prenormalization.

    It multiplies by the root of the norm ("norm"), applies batch norm to the vector ("batch_norm", a percent
    worse in the paper), or does nothing ("none", which the paper could not train).
    """

    kind: Literal["isqrt"] = "isqrt"
    width: Annotated[int, pydantic.Field(ge=1)] | None = 256
    compensation: Literal["norm", "batch_norm", "none"] = "norm"

    def build(self, channels: int) -> "ISqrtPooling":
        """Build the layer."""
        return ISqrtPooling(self, channels)


class ISqrtPooling(ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of the root of their covariance."""

    def __init__(self, config: ISqrtPoolingConfig, channels: int) -> None:
        super().__init__(channels, config.width)
        self.root = ISqrtCov(self.channels, config.newton_schulz(compensate=config.compensation == "norm"))
        self.out_features = self.root.out_features
        by_batch = config.compensation == "batch_norm"
        self.batch_norm: nn.Module = nn.BatchNorm1d(self.out_features) if by_batch else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vector; the root converts half-precision maps itself, inside its gradient."""
        return self.pool(self.reduce(features))

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector of a reduced map."""
        vector: Tensor = self.batch_norm(self.root(features))
        return vector
