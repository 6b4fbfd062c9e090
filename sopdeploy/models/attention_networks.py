"""SE, CBAM and Gather-Excite on each backbone.

Adding a backbone: a config that joins the backbone's and the attention's, a class that mixes `Attended` into
the backbone, and a line in `ENTRIES`.
"""

from typing import Any, Literal

from sopdeploy.backbones.preact_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.blocks.attended import (
    AttentionInside,
    BasicBlockAttendedInside,
    BottleneckAttendedInside,
    PreActBottleneckAttendedInside,
)
from sopdeploy.models.attention import Attended, AttentionConfig, CBAMConfig, GEConfig, SEConfig
from sopdeploy.models.entry import Entry


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
