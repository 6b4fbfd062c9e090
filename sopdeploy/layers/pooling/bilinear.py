"""Bilinear pooling: B-CNN, improved B-CNN and low-rank bilinear pooling.

Papers: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition" (ICCV 2015); Lin and Maji,
"Improved Bilinear Pooling with CNNs" (BMVC 2017). Letters: B images, C channels, M positions.
"""

import math
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, signed_root, unit_length
from sopdeploy.layers.spectral import MatrixRootConfig, square_root


class BilinearConfig(PoolingConfig):
    """B-CNN; it has no options."""

    kind: Literal["bcnn"] = "bcnn"

    def build(self, channels: int) -> GlobalPooling:
        """Build the layer; it has no weights."""
        return Bilinear(channels)


class ImprovedBilinearConfig(PoolingConfig, MatrixRootConfig):
    """The matrix square root; the paper compares an exact root with iterations."""

    kind: Literal["improved-bcnn"] = "improved-bcnn"

    def build(self, channels: int) -> GlobalPooling:
        """Build the layer; it has no weights."""
        return ImprovedBilinear(self, channels)


class Bilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to the signed root of X X^T / M, at unit length (B, C^2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = channels * channels

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector."""
        return unit_length(signed_root(bilinear(features).flatten(start_dim=1)))


class ImprovedBilinear(GlobalPooling):
    """Pool (B, C, H, W) maps like `Bilinear`, by the matrix square root of X X^T / M."""

    def __init__(self, config: ImprovedBilinearConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.not_exportable = config.not_exportable
        self.out_features = channels * channels

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector."""
        root_BCC = square_root(bilinear(features), self.config)
        return unit_length(signed_root(root_BCC.flatten(start_dim=1)))


def bilinear(features_BCHW: Tensor) -> Tensor:
    """Compute X X^T / M as (B, C, C); X is not centered."""
    x_BCM = features_BCHW.flatten(start_dim=2)
    x_BCM = x_BCM * (1.0 / math.sqrt(x_BCM.shape[2]))
    return x_BCM @ x_BCM.transpose(1, 2)


class LowRankBilinearConfig(PoolingConfig):
    """`width` is m, `rank` is r."""

    kind: Literal["low-rank-bilinear"] = "low-rank-bilinear"
    width: Annotated[int, pydantic.Field(ge=1)] = 100
    rank: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 8

    def build(self, channels: int) -> GlobalPooling:
        """Build the layer."""
        return LowRankBilinear(self, channels)


class LowRankBilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to (B, m^2), for its own low-rank classifier."""

    def __init__(self, config: LowRankBilinearConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.out_features = config.width**2
        self.layer_reduce = nn.Conv2d(channels, config.width, 1, bias=False)

    def reduce(self, features: Tensor) -> Tensor:
        """Reduce the map to (B, m, H, W)."""
        reduced: Tensor = self.layer_reduce(features)
        return reduced

    def pool(self, features: Tensor) -> Tensor:
        """Compute the bilinear matrix of reduced features as a vector."""
        return bilinear(features).flatten(start_dim=1)

    def classifier(self, num_classes: int) -> nn.Module:
        """Build the low-rank classifier."""
        return LowRankClassifier(self.config, num_classes)


class LowRankClassifier(nn.Module):
    """Classify a bilinear vector (B, m^2): (B, K) logits <W_k, S> + b_k with W_k of rank r."""

    signs: Tensor

    def __init__(self, config: LowRankBilinearConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.in_features = config.width**2
        self.factors = nn.Linear(config.width, num_classes * config.rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        half = config.rank // 2
        self.register_buffer("signs", torch.tensor([1.0] * half + [-1.0] * half), persistent=False)

    def forward(self, vector: Tensor) -> Tensor:
        """Compute the sum of u^T S u over each class's factors u, with their signs."""
        matrix_Bmm = vector.view(-1, self.config.width, self.config.width)
        half_BmF = self.factors(matrix_Bmm)
        forms_BF = (half_BmF * self.factors.weight.T).sum(dim=1)
        forms_BKr = forms_BF.view(-1, len(self.bias), self.config.rank)
        logits: Tensor = (forms_BKr * self.signs).sum(dim=2) + self.bias
        return logits
