"""Low-rank bilinear pooling: bilinear features of reduced channels under classifiers of low rank.

Paper: Kong and Fowlkes, "Low-rank Bilinear Pooling for Fine-Grained Classification" (CVPR 2017): channels
reduced to m = 100 by a linear 1x1 convolution (representation m^2, the published 10K), and for each class
W_k = U_k U_k^T - V_k V_k^T of rank r, half of it positive.
Letters: B images, m channels, K classes, r rank.

Assumption: the mean of the products over positions, and no further normalisation.
"""

from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig
from sopdeploy.pooling.bilinear import bilinear


class LowRankBilinearConfig(PoolingConfig):
    """`width` is m, `rank` is r."""

    kind: Literal["low-rank-bilinear"] = "low-rank-bilinear"
    width: Annotated[int, pydantic.Field(ge=1)] = 100
    rank: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 8

    def build(self, channels: int) -> GlobalPooling:
        """Return the layer."""
        return LowRankBilinear(self, channels)


class LowRankBilinear(GlobalPooling):
    """Feature map (B, C, H, W) in, (B, m^2) out, for a classifier of its own."""

    def __init__(self, config: LowRankBilinearConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.out_features = config.width**2
        self.layer_reduce = nn.Conv2d(channels, config.width, 1, bias=False)

    def reduce(self, features: Tensor) -> Tensor:
        """Return (B, m, H, W)."""
        reduced: Tensor = self.layer_reduce(features)
        return reduced

    def pool(self, features: Tensor) -> Tensor:
        """Return the bilinear matrix of reduced features as a vector."""
        return bilinear(features).flatten(start_dim=1)

    def classifier(self, num_classes: int) -> nn.Module:
        """Return the classifier of low rank."""
        return LowRankClassifier(self.config, num_classes)


class LowRankClassifier(nn.Module):
    """Bilinear vector (B, m^2) in, (B, K) logits <W_k, S> + b_k out."""

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
        """Return the sum of u^T S u over each class's factors u, with their signs."""
        matrix_Bmm = vector.view(-1, self.config.width, self.config.width)
        half_BmF = self.factors(matrix_Bmm)
        forms_BF = (half_BmF * self.factors.weight.T).sum(dim=1)
        forms_BKr = forms_BF.view(-1, len(self.bias), self.config.rank)
        logits: Tensor = (forms_BKr * self.signs).sum(dim=2) + self.bias
        return logits
