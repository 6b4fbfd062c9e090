"""GSoP-Nets on each backbone: where the blocks are, and what the paper's experiments use there."""

from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor

from sopdeploy.backbones.preact_resnet import STAGES as PREACT_STAGES
from sopdeploy.backbones.preact_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import BLOCKS, STAGES, ResNet, ResNetConfig
from sopdeploy.blocks.attended import (
    AttentionAfter,
    AttentionInside,
    BottleneckAttendedAfter,
    BottleneckAttendedInside,
    PreActBottleneckAttendedAfter,
    PreActBottleneckAttendedInside,
)
from sopdeploy.models.entry import Entry
from sopdeploy.models.gsop import GSoP, GSoPConfig
from sopdeploy.pooling.average import GapConfig

BLOCK_SPACING = 3  # 18 bottlenecks a stage, 6 of them with a block
FINAL_POOLING = {1: "gap", 2: "isqrt"}  # of GSoP-Net1 and GSoP-Net2


class GSoPResNetConfig(ResNetConfig, GSoPConfig):
    """ResNet of bottlenecks for 224-pixel images; conv5_x keeps its size, as in the paper."""

    depth: Literal[26, 50, 101] = 50
    conv5_stride: Literal[1, 2] = 1
    pooling: GapConfig = GapConfig()  # the end of this network is its own


class GSoPResNet(GSoP, ResNet):
    """GSoP-Net on ResNet-26/50/101: one block at the last bottleneck of a stage (section 4.1, Table 3)."""

    config: GSoPResNetConfig

    def __init__(self, config: GSoPResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach({stage: (n - 1,) for stage, n in zip(STAGES, BLOCKS[config.depth], strict=True)})

    def attended_block(self, channels: int) -> AttentionAfter | AttentionInside:
        """Return a bottleneck that keeps its input's shape."""
        inside = self.config.block_place == "inside"
        return (BottleneckAttendedInside if inside else BottleneckAttendedAfter)(channels, channels)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of averaged features, or of their covariance's root."""
        if self.config.final_pooling == "isqrt":
            return self.second_order_logits(features)
        return super().classify(features)


class GSoPPreActResNetConfig(PreActResNetConfig, GSoPConfig):
    """PreAct-ResNet of bottlenecks for 32-pixel images; covariances are narrower, conv4_x keeps its size."""

    blocks: Annotated[int, pydantic.Field(ge=2)] = 18  # the first of a stage changes the shape
    block: Literal["bottleneck"] = "bottleneck"
    last_stride: Literal[1, 2] = 1
    pooling: GapConfig = GapConfig()  # the end of this network is its own
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 64
    final_width: Annotated[int, pydantic.Field(ge=1)] = 128
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5


class GSoPPreActResNet(GSoP, PreActResNet):
    """GSoP-Net on PreAct-ResNet-164: a block at every third bottleneck (section 4.3).

    In GSoP-Net2 iSQRT-COV takes the place of the last one. Stages of two bottlenecks, which the paper does
    not have, get one block at their last.
    """

    config: GSoPPreActResNetConfig

    def __init__(self, config: GSoPPreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        spacing = min(BLOCK_SPACING, config.blocks)
        self.attach(dict.fromkeys(PREACT_STAGES, tuple(range(spacing - 1, config.blocks, spacing))))

    def attended_block(self, channels: int) -> AttentionAfter | AttentionInside:
        """Return a pre-activation bottleneck that keeps its input's shape."""
        inside = self.config.block_place == "inside"
        return (PreActBottleneckAttendedInside if inside else PreActBottleneckAttendedAfter)(
            channels, channels
        )

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of averaged features, or of their covariance's root."""
        if self.config.final_pooling == "isqrt":
            return self.second_order_logits(features)
        return super().classify(features)


def gsop_resnet(net: int, depth: int) -> Entry:
    """Return the entry of GSoP-Net*net* on a ResNet."""
    defaults: dict[str, Any] = {"depth": depth, "final_pooling": FINAL_POOLING[net]}
    return Entry(
        network=GSoPResNet,
        config=GSoPResNetConfig,
        defaults=defaults,
        image_size=224,
        num_classes=1000,
        summary=f"GSoP-Net{net} on ResNet-{depth}: covariances scale the channels of every stage",
    )


def gsop_preact_resnet(net: int, depth: int) -> Entry:
    """Return the entry of GSoP-Net*net* on a pre-activation ResNet of (depth - 2) / 9 bottlenecks a stage."""
    defaults: dict[str, Any] = {"blocks": (depth - 2) // 9, "final_pooling": FINAL_POOLING[net]}
    return Entry(
        network=GSoPPreActResNet,
        config=GSoPPreActResNetConfig,
        defaults=defaults,
        image_size=32,
        num_classes=100,
        summary=f"GSoP-Net{net} on PreAct-ResNet-{depth} for 32-pixel images",
    )


ENTRIES = {
    **{
        f"gsop-net{net}-resnet{depth}": gsop_resnet(net, depth)
        for net in FINAL_POOLING
        for depth in (26, 50, 101)
    },
    **{
        f"gsop-net{net}-preact-resnet{depth}": gsop_preact_resnet(net, depth)
        for net in FINAL_POOLING
        for depth in (29, 164)
    },
}
