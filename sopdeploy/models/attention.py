"""First-order attention in every residual block: SE, CBAM and Gather-Excite, GSoP's baselines.

Papers: see `blocks/squeeze_excite.py`, `blocks/cbam.py` and `blocks/gather_excite.py`; GSoP compares itself
with them in its Tables 5 and 6. The attention scales each block's residual before the addition.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from torch import nn

from sopdeploy.backbones.base import Backbone, initialise
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
from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.models.base import Classifier, Entry

Reduction = Annotated[int, pydantic.Field(ge=1)]


class Map(NamedTuple):
    """The feature map that an attention scales: its channels, and what the image's side is divided by."""

    channels: int
    reduced_by: int


class AttentionConfig(StrictModel):
    """What is in every block."""

    @abstractmethod
    def attention(self, features: Map) -> nn.Module:
        """Return a new attention module for these features."""


class SEConfig(AttentionConfig):
    """Squeeze-and-Excitation; `reduction` is r."""

    reduction: Reduction = 16

    def attention(self, features: Map) -> nn.Module:
        """Return a Squeeze-and-Excitation module."""
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
        """Return a convolutional block attention module."""
        return CBAM(features.channels, self.reduction, self.kernel)


class GEConfig(AttentionConfig):
    """Gather-Excite: its extent, its parameters and, for "gather+excite", r.

    The default is the network of GSoP's Table 5 (1.3 times the parameters of ResNet-50). Global gathering
    with parameters binds the network to images of `side` pixels; nothing else reads it.
    """

    extent: Extent = "global"
    parameters: Parameters = "gather+excite"
    reduction: Reduction = 16
    side: Annotated[int, pydantic.Field(ge=32)] = 224

    def attention(self, features: Map) -> nn.Module:
        """Return a Gather-Excite module."""
        side = -(-self.side // features.reduced_by)
        return GatherExcite(features.channels, side, self.extent, self.parameters, self.reduction)


class Attended(Classifier):
    """A network with an attention module, `attention`, in every residual block.

    To be mixed in before a backbone whose `branch_block` returns blocks that take an attention.
    """

    config: AttentionConfig
    pooling: GlobalPooling

    def attach(self, reduced_by: dict[str, int]) -> None:
        """Put an attention into every block; *reduced_by* says how much smaller a stage's maps are."""
        for place, channels in self.tap_channels.items():
            stage = place.partition(".")[0]
            attention = self.config.attention(Map(channels, reduced_by[stage]))
            initialise(attention)
            self.get_submodule(place).add_module("attention", attention)

    def inference_model(self) -> Backbone:
        """Return another one: all of it ships."""
        return type(self)(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


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
        last = 16 * config.conv5_stride
        self.attach({"layer1": 4, "layer2": 8, "layer3": 16, "layer4": last})

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> AttentionInside:
        """Return one residual block of this network's kind, its attention still to come."""
        if not self.bottlenecks:
            return BasicBlockAttendedInside(in_channels, out_channels, stride)
        stride_on: Literal["1x1", "3x3"] = "1x1" if self.config.bottleneck_stride == "v1" else "3x3"
        return BottleneckAttendedInside(in_channels, out_channels, stride, stride_on)


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
        """Return one pre-activation bottleneck, its attention still to come."""
        return PreActBottleneckAttendedInside(in_channels, out_channels, stride)


CONFIGS: dict[str, type[AttendedResNetConfig]] = {
    "se": SEResNetConfig,
    "cbam": CBAMResNetConfig,
    "ge": GEResNetConfig,
}
TITLES = {"se": "Squeeze-and-Excitation", "cbam": "CBAM", "ge": "Gather-Excite"}


def attended_resnet(kind: str, depth: int) -> Entry:
    """Return the entry of a ResNet with attention of one *kind*."""
    defaults: dict[str, Any] = {"depth": depth}
    return Entry(
        network=AttendedResNet,
        config=CONFIGS[kind],
        defaults=defaults,
        image_size=224,
        num_classes=1000,
        summary=f"ResNet-{depth} with {TITLES[kind]} in every block",
    )


SE_PREACT_164 = Entry(
    network=SEPreActResNet,
    config=SEPreActResNetConfig,
    defaults={},
    image_size=32,
    num_classes=100,
    summary="PreAct-ResNet-164 for 32-pixel images with Squeeze-and-Excitation in every block",
)

ENTRIES = {
    **{f"{kind}-resnet{depth}": attended_resnet(kind, depth) for kind in CONFIGS for depth in (18, 50, 101)},
    "se-preact-resnet164": SE_PREACT_164,
}
