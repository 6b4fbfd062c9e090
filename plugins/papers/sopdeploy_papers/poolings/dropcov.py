"""DropCov: the covariance without a square root; in training, channels are dropped before it.

Paper: Wang et al., "DropCov: A Simple yet Effective Method for Improving Deep Architectures"
(NeurIPS 2022). ResNet-50 with stride 1 in conv5_x and d = 128 has the 32.0 M parameters of its
table (78.19 % on ImageNet). Letters: B images, C channels, d channels after the reduction, H
height, W width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sopdeploy.base.config import Count
from sopdeploy.layers.covariance import TriangleIndices, covariance_matrix
from sopdeploy.layers.pooling.base import PoolingConfig, ReducedPooling

_SMALLEST = 1e-12  # of a divisor


class DropCov(TriangleIndices, ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of their covariance."""

    def __init__(self, config: "DropCovConfig", channels: int) -> None:
        super().__init__(channels, config.width)
        self.importance = nn.Conv1d(1, 1, 3, padding=1, bias=False)  # along the channels
        self.out_features = self.channels * (self.channels + 1) // 2
        self.register_triangle(self.channels)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the triangle (B, d (d + 1) / 2) of the covariance of a map (B, d, H, W)."""
        if self.training:
            features = self.drop(features)
        cov_Bdd = covariance_matrix(features)
        return self.upper_triangle(cov_Bdd)

    def drop(self, features: Tensor) -> Tensor:
        """Weight the channels of a map (B, d, H, W) by 1 + importance, and drop some of them per image."""
        weights_Bd = self.weights(features)
        weighted = features * (1.0 + weights_Bd)[:, :, None, None]
        rate = self.rate(weighted, weights_Bd)
        kept_Bd = torch.rand_like(weights_Bd) >= rate
        return weighted * (kept_Bd / (1.0 - rate).clamp_min(_SMALLEST))[:, :, None, None]

    def weights(self, features: Tensor) -> Tensor:
        """Compute the importance (B, d) of the channels: a softmax of their means and neighbors."""
        return self.importance(features.mean(dim=(2, 3)).unsqueeze(1)).squeeze(1).softmax(dim=1)

    @torch.no_grad()
    def rate(self, features: Tensor, weights_Bd: Tensor) -> Tensor:
        """Compute the rate of dropped channels (scalar in 0 to 1), without a gradient.

        The rate is 1 - 10 / log2(d) times the mean cosine between the importance of the
        channels and the row sums of their covariance: if the two agree, the representation has
        little to decorrelate.
        """
        sums_Bd = covariance_matrix(features).sum(dim=2)
        cosine_B = torch.cosine_similarity(weights_Bd, sums_Bd, dim=1)
        return (1.0 - 10.0 / math.log2(max(2, self.channels)) * cosine_B.mean()).clamp(0.0, 1.0)


class DropCovConfig(PoolingConfig):
    """`width` is d, the channels of the covariance."""

    layer = DropCov
    kind: Literal["dropcov"] = "dropcov"
    width: Count = 128
