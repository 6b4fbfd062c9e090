"""First-order attention in every residual block: SE, CBAM and Gather-Excite, baselines of GSoP.

Papers: Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018), section 3; Woo et al., "CBAM" (ECCV 2018);
Hu et al., "Gather-Excite" (NeurIPS 2018). GSoP compares itself with them in its Tables 5 and 6. The attention
scales each block's residual before the addition. Linear layers on channel means are 1x1 convolutions with
bias here.
"""

import math
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.config import Count, StrictModel
from sopdeploy.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.models.base import Classifier


def bottleneck_mlp(channels: int, reduction: int) -> nn.Sequential:
    """Build two linear layers on (B, C, 1, 1), with ReLU and C / *reduction* channels between them."""
    hidden = max(1, channels // reduction)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
    )


class CBAM(nn.Module):
    """Scale a feature map (B, C, H, W) by channel and by position; `reduction` is r.

    The convolution over positions has a 7x7 kernel, the best one in the paper.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.mlp = bottleneck_mlp(channels, reduction)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale (B, C, H, W) features by channel, then by position."""
        means_BC11 = features_BCHW.mean(dim=(2, 3), keepdim=True)
        maxima_BC11 = features_BCHW.amax(dim=(2, 3), keepdim=True)
        by_channel = features_BCHW * torch.sigmoid(self.mlp(means_BC11) + self.mlp(maxima_BC11))
        extremes_B2HW = torch.cat(
            [by_channel.amax(dim=1, keepdim=True), by_channel.mean(dim=1, keepdim=True)], dim=1
        )
        return by_channel * torch.sigmoid(self.bn(self.conv(extremes_B2HW)))


class GatherExcite(nn.Module):
    """Scale a feature map (B, C, H, W) by a function of all positions of each channel.

    Gathering has one weight per position, so it requires maps of *side* x *side*.
    """

    def __init__(self, channels: int, side: int, reduction: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
        self.gather = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.mlp = bottleneck_mlp(channels, reduction)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale (B, C, H, W) features by channel."""
        return features_BCHW * torch.sigmoid(self.mlp(self.gather(features_BCHW)))


class SEOptions(StrictModel):
    """Squeeze-and-Excitation, whose hidden layers have C / `reduction` channels."""

    reduction: Count = 16

    def build_attention(self, channels: int, _stage: str) -> nn.Module:
        """Build timm's Squeeze-and-Excitation, which scales a map of *channels* channels by channel.

        Global average pooling, linear layer to C / r (at least one), ReLU, linear layer to C, sigmoid.
        """
        timm = import_optional("timm.layers", "timm", "sopdeploy[train]", MissingPackageError)
        return timm.SEModule(channels, rd_channels=max(1, channels // self.reduction))


class SEResNetConfig(ResNetConfig, SEOptions):
    """A ResNet with Squeeze-and-Excitation."""


class CBAMResNetConfig(ResNetConfig):
    """A ResNet with CBAM; `reduction` is r."""

    reduction: Count = 16

    def build_attention(self, channels: int, _stage: str) -> nn.Module:
        """Build the attention of a block of *channels* channels."""
        return CBAM(channels, self.reduction)


class GEResNetConfig(ResNetConfig):
    """A ResNet with Gather-Excite: with parameters and global extent, as in GSoP's Table 5.

    `reduction` is r. The network accepts images of `side` pixels only.
    """

    reduction: Count = 16
    side: Annotated[int, pydantic.Field(ge=32)] = 224

    def build_attention(self, channels: int, stage: str) -> nn.Module:
        """Build the attention of a block of *channels* channels for the size of the maps of *stage*."""
        reduced_by = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16 * self.conv5_stride}
        return GatherExcite(channels, math.ceil(self.side / reduced_by[stage]), self.reduction)


class SEPreActResNetConfig(PreActResNetConfig, SEOptions):
    """A pre-activation ResNet of bottlenecks for 32-pixel images with Squeeze-and-Excitation."""

    block: Literal["bottleneck"] = "bottleneck"


class Attended(Classifier):
    """Mixin that adds a module `attention` to every residual block of the backbone after it in the bases."""

    config: SEResNetConfig | CBAMResNetConfig | GEResNetConfig | SEPreActResNetConfig

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        for tap, channels in self.tap_channels.items():
            block: Any = self.get_submodule(tap)
            block.attention = self.config.build_attention(channels, tap.partition(".")[0])
            initialize(block.attention)


class AttendedResNet(Attended, ResNet):
    """ResNet-18/34/50/101 with an attention module in every block."""

    config: SEResNetConfig | CBAMResNetConfig | GEResNetConfig


class SEPreActResNet(Attended, PreActResNet):
    """PreAct-ResNet-164 with Squeeze-and-Excitation in every block (GSoP, Table 6)."""

    config: SEPreActResNetConfig
