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
from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.layers.attention.gsop_attention import (
    Activation,
    ChannelAttention,
    PositionAttention,
    PositionSwitches,
)

FusionKind = Literal["average", "sum", "maximum", "concatenation"]
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


class GSoPBlockConfig(StrictModel):
    """Options of the block; defaults are the paper's.

    `attention` selects the weights that scale the map: of channels, of positions, or of both, with the way to
    fuse the two results. `cov_width` is d. `position_side` is the side of the map whose positions are
    correlated (6, 8 and 12 are Table 4's 36, 64 and 144). `channel_norm` and `position_norm` add a batch norm
    after the row-wise convolution (Table 2); the printed parameters of the position-wise block are those
    without it. `RELEASED_BLOCK` lists the options in which the released code differs from the paper.
    """

    attention: Literal["channel", "position"] | FusionKind = "channel"
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 128
    position_side: Annotated[int, pydantic.Field(ge=2, le=16)] = 8
    pre_relu: bool = False
    channel_norm: bool = True
    position_norm: bool = False
    channel_activation: Activation = "lrelu"
    position_activation: Activation = "lrelu"
    position_rectify: Literal["reduced", "scaled"] = "reduced"
    position_covariance: Literal["centred", "uncentred"] = "centred"
    position_upsampling: Literal["nearest", "average"] = "nearest"


RELEASED_BLOCK = {
    "pre_relu": True,
    "channel_norm": False,
    "channel_activation": "none",
    "position_activation": "relu",
    "position_rectify": "scaled",
    "position_covariance": "uncentred",
    "position_upsampling": "average",
}


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
            self.channel = ChannelAttention(
                channels,
                config.cov_width,
                dr_stride,
                config.channel_activation,
                pre_relu=config.pre_relu,
                norm=config.channel_norm,
            )
        if kind != "channel":
            switches = PositionSwitches(
                side=config.position_side,
                activation=config.position_activation,
                rectify=config.position_rectify,
                covariance=config.position_covariance,
                upsampling=config.position_upsampling,
                pre_relu=config.pre_relu,
                norm=config.position_norm,
            )
            self.position = PositionAttention(channels, config.cov_width, switches)
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
        match self.config.attention:
            case "channel":
                return by_channel
            case "position":
                return by_position
            case "maximum":
                return torch.maximum(by_channel, by_position)
            case "sum":
                return by_channel + by_position
            case "average":
                return (by_channel + by_position) * 0.5
        assert self.fusion is not None  # noqa: S101 - the concatenation has parameters
        fused: Tensor = self.fusion(by_channel, by_position)
        return fused
