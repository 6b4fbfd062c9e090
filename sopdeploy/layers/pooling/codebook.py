"""Poolings with a learned codebook: NetVLAD and NetFV.

Papers: Arandjelovic et al., "NetVLAD: CNN Architecture for Weakly Supervised Place Recognition" (CVPR
2016), Eq. (4). The slides on iSQRT-COV define the assignment from the centers, and the simple NetFV, the
Fisher vector in the same form. 64 words make 32768 dimensions of VGG's 512 channels.
Letters: B images, C channels, M positions, K words.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sopdeploy.config import Count, Positive
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_length


class Codebook(GlobalPooling):
    """Soft assignment of positions to words: 1x1 convolution with bias, softmax over words.

    The convolution starts as the assignment to the nearest centers.
    """

    def __init__(self, config: "CodebookConfig", channels: int) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.assignment = nn.Conv2d(channels, config.words, 1)
        shape = config.words, channels
        normal = config.centres == "normal"
        self.centres = nn.Parameter(torch.randn(shape) / math.sqrt(channels) if normal else torch.rand(shape))
        self.out_features = config.words * channels
        self.finish_initialization()

    @torch.no_grad()
    def finish_initialization(self) -> None:
        """Set the convolution to w = 2 alpha c (K, C, 1, 1) and b = -alpha |c|^2 (K,).

        The softmax of w x + b is that of -alpha |x - c|^2.
        """
        self.assignment.weight.copy_(2 * self.alpha * self.centres[:, :, None, None])
        self.assignment.get_parameter("bias").copy_(-self.alpha * self.centres.square().sum(dim=1))


class CodebookConfig(PoolingConfig):
    """`words` is K. The soft assignment starts as the softmax of -`alpha` |x - c|^2.

    The centers c start at random: uniform in 0 to 1, or normal with deviation 1 / sqrt(C). Assumption,
    because the papers print no value for these features: alpha is 0.1.
    """

    words: Count = 64
    alpha: Positive = 0.1
    centres: Literal["uniform", "normal"] = "uniform"


class NetVLAD(Codebook):
    """Pool (B, C, H, W) maps to sums of residuals to K centers (B, K C)."""

    def pool(self, features: Tensor) -> Tensor:
        """Compute each word's sum of a (x - c), scaled to unit length per word, then as a whole (B, K C).

        The shares a are the softmax over words. The sum over positions is (sum of a x) - (sum of a) c.
        """
        a_BKM = self.assignment(features).flatten(start_dim=2).softmax(dim=1)
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        residual_BKC = a_BKM @ x_BMC - a_BKM.sum(dim=2, keepdim=True) * self.centres
        return unit_length(unit_length(residual_BKC, dim=2).flatten(start_dim=1), dim=1)


class NetVLADConfig(CodebookConfig):
    """Options of NetVLAD."""

    layer = NetVLAD
    kind: Literal["netvlad"] = "netvlad"


class NetFV(Codebook):
    """Pool (B, C, H, W) maps to first and second order residuals to K words (B, 2 K C).

    This is the simple form of the slides, without the words' deviations.
    """

    def __init__(self, config: "NetFVConfig", channels: int) -> None:
        super().__init__(config, channels)
        self.out_features = 2 * config.words * channels

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, 2 K C): the sums of a (x - c) and of a (x - c)^2.

        The shares a are the softmax over words. Every word, each half and the vector have unit length.
        """
        a_BKM = self.assignment(features).flatten(start_dim=2).softmax(dim=1)
        x_BMC, total_BK1 = features.flatten(start_dim=2).transpose(1, 2), a_BKM.sum(dim=2, keepdim=True)
        sum_BKC = a_BKM @ x_BMC
        first_BKC = sum_BKC - total_BK1 * self.centres
        second_BKC = a_BKM @ x_BMC.square() - 2.0 * sum_BKC * self.centres + total_BK1 * self.centres.square()
        halves = [unit_length(half, dim=2).flatten(start_dim=1) for half in (first_BKC, second_BKC)]
        return unit_length(torch.cat([unit_length(half, dim=1) for half in halves], dim=1), dim=1)


class NetFVConfig(CodebookConfig):
    """Options of NetFV."""

    layer = NetFV
    kind: Literal["netfv"] = "netfv"
