"""Poolings with a learned codebook: NetVLAD and NetFV.

Papers: Arandjelovic et al., "NetVLAD: CNN Architecture for Weakly Supervised Place Recognition"
(CVPR 2016), Eq. (4). The slides on iSQRT-COV define the simple NetFV, the Fisher vector in the
same form without deviations. 64 words make 32,768 and 65,536 dimensions of VGG's 512 channels.
Letters: B images, C channels, M positions, K words.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sopdeploy.base.config import Count, Positive
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_length


class Codebook(GlobalPooling):
    """Soft assignment of positions to words: a linear layer, softmax over words.

    The layer starts as the assignment to the nearest centers c: the softmax of 2 alpha c x -
    alpha |c|^2 is that of -alpha |x - c|^2.
    """

    def __init__(self, config: "CodebookConfig", channels: int) -> None:
        super().__init__()
        self.assignment = nn.Linear(channels, config.words)
        self.centers = nn.Parameter(torch.rand(config.words, channels))
        self.out_features = config.words * channels

        with torch.no_grad():
            self.assignment.weight.copy_(2 * config.alpha * self.centers)
            self.assignment.bias.copy_(-config.alpha * self.centers.square().sum(dim=1))

    def sums(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the positions (B, M, C), the shares of words a (B, K, M), and the sums of a (B, K, 1)."""
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        a_BKM = self.assignment(x_BMC).softmax(dim=2).transpose(1, 2)
        return x_BMC, a_BKM, a_BKM.sum(dim=2, keepdim=True)


class CodebookConfig(PoolingConfig):
    """`words` is K. The soft assignment starts as the softmax of -`alpha` |x - c|^2.

    The centers c start uniform in 0 to 1. Assumption, because the papers print no value for
    these features: alpha is 0.1.
    """

    words: Count = 64
    alpha: Positive = 0.1


class NetVLAD(Codebook):
    """Pool (B, C, H, W) maps to sums of residuals to K centers (B, K C)."""

    def pool(self, features: Tensor) -> Tensor:
        """Compute each word's sum of a (x - c), scaled to unit length per word, then as a whole (B, K C)."""
        x_BMC, a_BKM, total_BK1 = self.sums(features)
        residual_BKC = a_BKM @ x_BMC - total_BK1 * self.centers
        return unit_length(unit_length(residual_BKC, dim=2).flatten(start_dim=1), dim=1)


class NetVLADConfig(CodebookConfig):
    """Options of NetVLAD."""

    layer = NetVLAD
    kind: Literal["netvlad"] = "netvlad"


class NetFV(Codebook):
    """Pool (B, C, H, W) maps to first and second order residuals to K words (B, 2 K C)."""

    def __init__(self, config: "NetFVConfig", channels: int) -> None:
        super().__init__(config, channels)
        self.out_features = 2 * config.words * channels

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, 2 K C): the sums of a (x - c) and of a (x - c)^2.

        Every word, each half and the vector have unit length.
        """
        x_BMC, a_BKM, total_BK1 = self.sums(features)
        sum_BKC = a_BKM @ x_BMC

        # Sums over the positions: of a (x - c), and of a (x - c)^2, multiplied out.
        first_BKC = sum_BKC - total_BK1 * self.centers
        second_BKC = (
            a_BKM @ x_BMC.square()
            - 2.0 * sum_BKC * self.centers
            + total_BK1 * self.centers.square()
        )

        halves = [
            unit_length(half, dim=2).flatten(start_dim=1) for half in (first_BKC, second_BKC)
        ]
        return unit_length(
            torch.cat([unit_length(half, dim=1) for half in halves], dim=1), dim=1
        )


class NetFVConfig(CodebookConfig):
    """Options of NetFV."""

    layer = NetFV
    kind: Literal["netfv"] = "netfv"
