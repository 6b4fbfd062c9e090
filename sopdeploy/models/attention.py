"""First-order attention in every residual block: SE, CBAM and Gather-Excite, GSoP's baselines.

Papers: see `layers/attention/first_order.py`; GSoP compares itself with them in its Tables 5 and 6. The
attention scales each block's residual before the addition.
"""

from abc import abstractmethod
from typing import Annotated, Literal, NamedTuple

import pydantic
from torch import nn

from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.config import StrictModel
from sopdeploy.layers.attention.first_order import (
    CBAM,
    AttentionInside,
    BasicBlockAttendedInside,
    BottleneckAttendedInside,
    Extent,
    GatherExcite,
    Parameters,
    PreActBottleneckAttendedInside,
    SqueezeExcite,
)
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.plain import imagenet_entry

Reduction = Annotated[int, pydantic.Field(ge=1)]


class Map(NamedTuple):
    """The feature map that an attention scales: its channels, and the divisor of the image's side."""

    channels: int
    reduced_by: int


class AttentionConfig(StrictModel):
    """Base class of the options of an attention module."""

    @abstractmethod
    def attention(self, features: Map) -> nn.Module:
        """Build an attention module for these features."""


class SEConfig(AttentionConfig):
    """Squeeze-and-Excitation; `reduction` is r."""

    reduction: Reduction = 16

    def attention(self, features: Map) -> nn.Module:
        """Build a Squeeze-and-Excitation module."""
        return SqueezeExcite(features.channels, self.reduction)


class CBAMConfig(AttentionConfig):
    """CBAM; `reduction` is r, `kernel` the side of the convolution over positions."""

    reduction: Reduction = 16
    kernel: Annotated[int, pydantic.Field(ge=1, le=15)] = 7

    @pydantic.field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("kernel must be odd, so that the map keeps its size")
        return kernel

    def attention(self, features: Map) -> nn.Module:
        """Build a convolutional block attention module."""
        return CBAM(features.channels, self.reduction, self.kernel)


class GEConfig(AttentionConfig):
    """Gather-Excite: its extent, its parameters and, for "gather+excite", r.

    The default is the network of GSoP's Table 5 (1.3 times the parameters of ResNet-50). Global gathering
    with parameters ties the network to images of `side` pixels, the only use of this option.
    """

    extent: Extent = "global"
    parameters: Parameters = "gather+excite"
    reduction: Reduction = 16
    side: Annotated[int, pydantic.Field(ge=32)] = 224

    def attention(self, features: Map) -> nn.Module:
        """Build a Gather-Excite module."""
        side = -(-self.side // features.reduced_by)
        return GatherExcite(features.channels, side, self.extent, self.parameters, self.reduction)


class Attended(Classifier):
    """Mixin that adds a module `attention` to every residual block.

    Put it before a backbone in the bases whose `branch_block` returns blocks that take an attention.
    """

    config: AttentionConfig

    def attach(self, reduced_by: dict[str, int]) -> None:
        """Add an attention to every block; *reduced_by* maps a stage to the divisor of the image's side."""
        for place, channels in self.tap_channels.items():
            stage = place.partition(".")[0]
            attention = self.config.attention(Map(channels, reduced_by[stage]))
            initialize(attention)
            self.get_submodule(place).add_module("attention", attention)


class AttendedResNetConfig(ResNetConfig, AttentionConfig):
    """A ResNet for 224-pixel images with some attention in every block."""


class SEResNetConfig(AttendedResNetConfig, SEConfig):
    """A ResNet with Squeeze-and-Excitation."""


class CBAMResNetConfig(AttendedResNetConfig, CBAMConfig):
    """A ResNet with CBAM."""


class GEResNetConfig(AttendedResNetConfig, GEConfig):
    """A ResNet with Gather-Excite."""


class AttendedResNet(Attended, ResNet):
    """ResNet-18/34/50/101 with an attention module in every block."""

    config: AttendedResNetConfig

    def __init__(self, config: AttendedResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach({"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16 * config.conv5_stride})

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> AttentionInside:
        """Build a residual block of this network's kind, still without its attention."""
        if not self.bottlenecks:
            return BasicBlockAttendedInside(in_channels, out_channels, stride)
        return BottleneckAttendedInside(in_channels, out_channels, stride, self.stride_on)


class SEPreActResNetConfig(PreActResNetConfig, SEConfig):
    """A pre-activation ResNet of bottlenecks for 32-pixel images with Squeeze-and-Excitation."""

    block: Literal["bottleneck"] = "bottleneck"


class SEPreActResNet(Attended, PreActResNet):
    """PreAct-ResNet-164 with Squeeze-and-Excitation in every block (GSoP, Table 6)."""

    config: SEPreActResNetConfig

    def __init__(self, config: SEPreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach({"layer1": 1, "layer2": 2, "layer3": 2 * config.last_stride})

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> AttentionInside:
        """Build a pre-activation bottleneck, still without its attention."""
        return PreActBottleneckAttendedInside(in_channels, out_channels, stride)


CONFIGS: dict[str, tuple[type[AttendedResNetConfig], str]] = {
    "se": (SEResNetConfig, "Squeeze-and-Excitation"),
    "cbam": (CBAMResNetConfig, "CBAM"),
    "ge": (GEResNetConfig, "Gather-Excite"),
}

ENTRIES = {
    **{
        f"{kind}-resnet{depth}": imagenet_entry(
            AttendedResNet, config, f"ResNet-{depth} with {title} in every block", depth=depth
        )
        for kind, (config, title) in CONFIGS.items()
        for depth in (18, 50, 101)
    },
    "se-preact-resnet164": Entry(
        network=SEPreActResNet,
        config=SEPreActResNetConfig,
        defaults={},
        image_size=32,
        num_classes=100,
        summary="PreAct-ResNet-164 for 32-pixel images with Squeeze-and-Excitation in every block",
    ),
}
