"""First-order attention in every residual block: SE, CBAM and Gather-Excite, baselines of GSoP.

Papers: see `layers/attention/first_order.py`; GSoP compares itself with them in its Tables 5 and 6. The
attention scales each block's residual before the addition.
"""

import math
from typing import Annotated, Any, Literal

import pydantic
from torch import nn

from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.config import Count, StrictModel
from sopdeploy.layers.attention.first_order import CBAM, GatherExcite, squeeze_excite
from sopdeploy.models.base import Classifier, Entry


class SEOptions(StrictModel):
    """Squeeze-and-Excitation, whose hidden layers have C / `reduction` channels."""

    reduction: Count = 16

    def build_attention(self, channels: int, _stage: str) -> nn.Module:
        """Build the attention of a block of *channels* channels."""
        return squeeze_excite(channels, self.reduction)


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


ENTRIES = {
    **{
        f"{kind}-resnet50": Entry(
            AttendedResNet, config, {"depth": 50}, f"ResNet-50 with {title} in every block"
        )
        for kind, config, title in (
            ("se", SEResNetConfig, "Squeeze-and-Excitation"),
            ("cbam", CBAMResNetConfig, "CBAM"),
            ("ge", GEResNetConfig, "Gather-Excite"),
        )
    },
    "se-preact-resnet164": Entry(
        SEPreActResNet,
        SEPreActResNetConfig,
        {},
        "PreAct-ResNet-164 for 32-pixel images with Squeeze-and-Excitation in every block",
        image_size=32,
        num_classes=100,
    ),
}
