"""GSoP-Nets on each backbone: where the blocks are, and what the paper's experiments use there."""

from typing import Any, Literal

from torch import Tensor

from sopdeploy.backbones.resnet import BLOCKS, STAGES, ResNet, ResNetConfig
from sopdeploy.blocks.attended import (
    AttentionAfter,
    AttentionInside,
    BottleneckAttendedAfter,
    BottleneckAttendedInside,
)
from sopdeploy.models.entry import Entry
from sopdeploy.models.gsop import GSoP, GSoPConfig


class GSoPResNetConfig(ResNetConfig, GSoPConfig):
    """ResNet of bottlenecks for 224-pixel images; conv5_x keeps its size, as in the paper."""

    depth: Literal[26, 50, 101] = 50
    conv5_stride: Literal[1, 2] = 1


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


FINAL_POOLING = {1: "gap", 2: "isqrt"}


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


ENTRIES = {
    f"gsop-net{net}-resnet{depth}": gsop_resnet(net, depth)
    for net in FINAL_POOLING
    for depth in (26, 50, 101)
}
