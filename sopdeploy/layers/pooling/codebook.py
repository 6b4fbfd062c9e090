"""Poolings with a learned codebook: NetVLAD and NetFV.

Papers: Arandjelovic et al., "NetVLAD: CNN Architecture for Weakly Supervised Place Recognition" (CVPR
2016), Eq. (4); NetFV, the Fisher vector in the same form, as Miech et al., "Learnable pooling with Context
Gating" (2017), Eqs. (6) and (7), write it. 64 words make 32768 dimensions of VGG's 512 channels.
Letters: B images, C channels, M positions, K words.
"""

import math
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_length

SMALLEST_DEVIATION = 1e-3

Words = Annotated[int, pydantic.Field(ge=1)]


class Codebook(GlobalPooling):
    """Soft assignment of positions to words: 1x1 convolution with bias, softmax over words."""

    def __init__(self, config: "NetVLADConfig | NetFVConfig", channels: int) -> None:
        super().__init__()
        self.assignment = nn.Conv2d(channels, config.words, 1)
        self.centres = nn.Parameter(torch.rand(config.words, channels))
        self.out_features = config.words * channels

    def assigned(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute assignments (B, K, M), positions (B, M, C) and each word's total (B, K, 1)."""
        a_BKM = self.assignment(features).flatten(start_dim=2).softmax(dim=1)
        return a_BKM, features.flatten(start_dim=2).transpose(1, 2), a_BKM.sum(dim=2, keepdim=True)


class NetVLAD(Codebook):
    """Pool (B, C, H, W) maps to sums of residuals to K centers (B, K C).

    Each word's residuals are scaled to unit length, then the whole vector is.
    """

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, K C): the sum of a (x - c) over positions is (sum of a x) - (sum of a) c."""
        a_BKM, x_BMC, total_BK1 = self.assigned(features)
        residuals_BKC = a_BKM @ x_BMC - total_BK1 * self.centres
        return unit_length(unit_length(residuals_BKC, dim=2).flatten(start_dim=1), dim=1)


class NetVLADConfig(PoolingConfig):
    """Options of NetVLAD: `words` is K, the number of centers."""

    layer = NetVLAD
    kind: Literal["netvlad"] = "netvlad"
    words: Words = 64


class NetFV(Codebook):
    """Pool (B, C, H, W) maps to first and second order residuals to K words (B, 2 K C)."""

    def __init__(self, config: "NetFVConfig", channels: int) -> None:
        super().__init__(config, channels)
        self.deviations = nn.Parameter(torch.ones(config.words, channels))
        self.out_features = 2 * config.words * channels

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, 2 K C): the sums of a (x - c) / s and of a ((x - c)^2 / s^2 - 1)."""
        a_BKM, x_BMC, total_BK1 = self.assigned(features)
        deviations_KC = self.deviations.abs().clamp_min(SMALLEST_DEVIATION)
        sum_BKC = a_BKM @ x_BMC
        first_BKC = (sum_BKC - total_BK1 * self.centres) / deviations_KC
        spread_BKC = a_BKM @ x_BMC.square() - 2.0 * sum_BKC * self.centres + total_BK1 * self.centres.square()
        second_BKC = spread_BKC / deviations_KC.square() - total_BK1
        halves = [unit_length(half, dim=2).flatten(start_dim=1) for half in (first_BKC, second_BKC)]
        return unit_length(torch.cat([unit_length(half, dim=1) for half in halves], dim=1), dim=1)


class NetFVConfig(PoolingConfig):
    """Options of NetFV: `words` is K, the number of Gaussian components."""

    layer = NetFV
    kind: Literal["netfv"] = "netfv"
    words: Words = 64


class GMSOPNetVLAD(nn.Module):
    """GM-SOP's NetVLAD baseline: pool (B, C, H, W) maps to normalized residuals (B, K C)."""

    def __init__(self, channels: int, words: int) -> None:
        super().__init__()
        self.assign = nn.Conv2d(channels, words, 1)
        self.centres = nn.Parameter(torch.randn(words, channels) / math.sqrt(channels))
        self.out_features = words * channels

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the residuals (B, K C), scaled to unit length per word, then as a whole vector."""
        assigned_BKM = self.assign(features_BCHW).flatten(start_dim=2).softmax(dim=1)
        x_BMC = features_BCHW.flatten(start_dim=2).transpose(1, 2)
        residual_BKC = assigned_BKM @ x_BMC - assigned_BKM.sum(dim=2, keepdim=True) * self.centres
        return unit_length(unit_length(residual_BKC, dim=2).flatten(start_dim=1), dim=1)
