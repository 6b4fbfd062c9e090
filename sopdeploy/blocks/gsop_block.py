"""The GSoP block: a feature map scaled by what its own second-order statistics say.

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

from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.blocks.gsop_channel import ChannelAttention
from sopdeploy.blocks.gsop_excitation import Activation
from sopdeploy.blocks.gsop_fusion import FusionKind, fusion
from sopdeploy.blocks.gsop_position import PositionAttention, PositionSwitches
from sopdeploy.frozen import Frozen


class GSoPBlockConfig(Frozen):
    """Switches of the block that change its numbers; defaults are the paper's.

    `attention` says what the map is scaled by: its channels, its positions, or both and how the two
    are fused. `cov_width` is d. `position_side` is the side of the map whose positions are
    correlated (6, 8 and 12 are Table 4's 36, 64 and 144). The others are where the released code
    leaves the paper: `RELEASED_BLOCK` names the code's values.
    """

    attention: Literal["channel", "position"] | FusionKind = "channel"
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 128
    position_side: Annotated[int, pydantic.Field(ge=2, le=16)] = 8
    pre_relu: bool = False
    channel_activation: Activation = "lrelu"
    position_activation: Activation = "lrelu"
    position_rectify: Literal["reduced", "scaled"] = "reduced"
    position_covariance: Literal["centred", "uncentred"] = "centred"
    position_upsampling: Literal["nearest", "average"] = "nearest"


RELEASED_BLOCK = {
    "pre_relu": True,
    "channel_activation": "none",
    "position_activation": "relu",
    "position_rectify": "scaled",
    "position_covariance": "uncentred",
    "position_upsampling": "average",
}


class GSoPBlock(nn.Module):
    """Feature map (B, C, H, W) in, the scaled map of the same shape out; the shortcut is not in it."""

    channel: ChannelAttention | None
    position: PositionAttention | None
    fusion: nn.Module | None

    def __init__(self, config: GSoPBlockConfig, channels: int, dr_stride: int) -> None:
        super().__init__()
        self.config = config
        kind = config.attention
        self.channel = self.position = self.fusion = None
        if kind != "position":
            self.channel = ChannelAttention(
                channels, config.cov_width, dr_stride, config.channel_activation, pre_relu=config.pre_relu
            )
        if kind != "channel":
            self.position = PositionAttention(channels, config.cov_width, position_switches(config))
            self.fusion = None if kind == "position" else fusion(kind, channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the map scaled by channel, by position, or by both and fused."""
        scaled: list[Tensor] = []
        if self.channel is not None:
            scaled.append(features_BCHW * self.channel(features_BCHW))
        if self.position is not None:
            by_position = features_BCHW * self.position(features_BCHW)
            scaled.append(F.relu(by_position) if self.config.position_rectify == "scaled" else by_position)
        fused: Tensor = scaled[0] if self.fusion is None else self.fusion(*scaled)
        return fused


def position_switches(config: GSoPBlockConfig) -> PositionSwitches:
    """Return the switches of the position-wise half."""
    return PositionSwitches(
        side=config.position_side,
        activation=config.position_activation,
        rectify=config.position_rectify,
        covariance=config.position_covariance,
        upsampling=config.position_upsampling,
        pre_relu=config.pre_relu,
    )
