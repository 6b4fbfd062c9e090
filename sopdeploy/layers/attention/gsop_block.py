"""The GSoP block: a feature map scaled by weights from its own second-order statistics.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3, Fig. 1(b).
Letters: B images, C channels, d channels after dimension reduction (DR), H height, W width.

Names in released checkpoints, under `layerS.B.`, and here, under `layerS.B.attention.`:

    conv_for_DR, bn_for_DR                   channel.reduction.0, .1
    row_bn, row_conv_group                   channel.excitation.row_bn, .row_conv
    fc_adapt_channels                        channel.excitation.conv
    the same five with _spatial at the end   position.*  (row_bn_for_spatial, ...)
    dilate_conv_for_concat1, 2               fusion.conv_channel, fusion.conv_position
    bn_for_concat                            fusion.bn
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.errors import ConfigError
from sopdeploy.layers.attention.gsop_attention import ChannelAttention, GSoPBlockConfig, PositionAttention

CHANNELS_PER_GROUP = 64
MOST_GROUPS = 32


class Concatenation(nn.Module):
    """Fuse two tensors (B, C, H, W): grouped convolutions with kernel (k, 1), sum, batch norm.

    This equals one convolution of the tensors' concatenation. k is 11, 9, 7, 5 for C = 256, 512, 1024, 2048:
    fewer groups have longer kernels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = channels // CHANNELS_PER_GROUP
        if groups == 0 or channels % groups:
            raise ConfigError(
                f"attention=concatenation: needs a multiple of {CHANNELS_PER_GROUP} channels, got {channels}"
                "; choose average, sum or maximum, or a wider network"
            )
        reach = int(math.log2(MOST_GROUPS / groups)) + 2
        kernel, padding = (2 * reach + 1, 1), (reach, 0)
        self.conv_channel = nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups)
        self.conv_position = nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, by_channel: Tensor, by_position: Tensor) -> Tensor:
        """Compute the fused tensor."""
        fused: Tensor = self.bn(self.conv_channel(by_channel) + self.conv_position(by_position))
        return fused


class GSoPBlock(nn.Module):
    """Scale a feature map (B, C, H, W); the shortcut is not part of the block."""

    channel: ChannelAttention | None
    position: PositionAttention | None
    fusion: Concatenation | None

    def __init__(self, config: GSoPBlockConfig, channels: int, dr_stride: int) -> None:
        super().__init__()
        self.config = config
        kind = config.attention
        self.channel = self.position = self.fusion = None
        if kind != "position":
            self.channel = ChannelAttention(config, channels, dr_stride)
        if kind != "channel":
            self.position = PositionAttention(config, channels)
            if kind == "concatenation":
                self.fusion = Concatenation(channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale the map by channel, by position, or by both and fuse the two."""
        by_channel = by_position = features_BCHW
        if self.channel is not None:
            by_channel = features_BCHW * self.channel(features_BCHW)
        if self.position is not None:
            by_position = features_BCHW * self.position(features_BCHW)
            if self.config.position_rectify == "scaled":
                by_position = F.relu(by_position)
        if self.position is None:
            return by_channel
        if self.channel is None:
            return by_position
        if self.fusion is not None:
            fused: Tensor = self.fusion(by_channel, by_position)
            return fused
        if self.config.attention == "maximum":
            return torch.maximum(by_channel, by_position)
        total = by_channel + by_position
        return total if self.config.attention == "sum" else total * 0.5
