"""DSoP on the backbones for 224-pixel images: where the branches start and what they are made of.

Adding a backbone: a config that joins the backbone's and `DSoPConfig`, a class that mixes `DSoP` into the
backbone and says what its branches are, and a line in `ENTRIES`.
"""

from typing import Literal

from torch import nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.efficientnet import STAGES, EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.blocks.mbconv import swish_reduction
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches, shared_fields
from sopdeploy.models.entry import Entry


class DSoPResNetConfig(ResNetConfig, DSoPConfig):
    """ResNet for 224-pixel images with branches; conv5_x keeps its size, as in the paper."""

    conv5_stride: Literal[1, 2] = 1
    aux_stride: Literal["text", "table"] = "text"


class DSoPResNet(DSoP, ResNet):
    """DSoP on ResNet-18/34/50/101: four branches, after conv2_x to conv5_x (section III-B, Table I).

    Assumption: the branches of ResNet-26 and ResNet-101 are those of ResNet-50.
    """

    config: DSoPResNetConfig

    def __init__(self, config: DSoPResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

    def paper_branches(self) -> PaperBranches:
        """Return four branches of 2 basic blocks, or of 3, 4, 6, 3 bottlenecks."""
        table = self.config.aux_stride == "table"
        blocks, widths = (2, 2, 2, 2), (64, 128, 256, 256)
        if self.bottlenecks:
            blocks = (3, 4, 7, 3) if table else (3, 4, 6, 3)
            widths = (256, 256, 256, 256) if table else (64, 256, 256, 256)
        strides = (1, 2, 2, 1) if table else (1, 1, 1, 1)
        return PaperBranches(blocks=blocks, widths=widths, weights=(1.0,) * 4, strides=strides)

    def plain(self) -> Backbone:
        """Return the ResNet without branches."""
        return ResNet(ResNetConfig(**shared_fields(self.config, ResNetConfig)), self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of conv5_x by default."""
        return self.pooling.out_features


class DSoPEfficientNetConfig(EfficientNetConfig, DSoPConfig):
    """EfficientNet-b0 with branches."""


class DSoPEfficientNet(DSoP, EfficientNet):
    """DSoP on EfficientNet-b0: two branches, in the middle and at the end (section V-B).

    As in the paper's second-order head for this network, DR to 64 channels ends with swish and dropout
    of 0.2 stands before the classifier. Assumptions, where the paper is silent: the middle is the last
    block of stride 16 and the end the last block before the 1x1 convolution to 1280 channels; a branch
    repeats its stage, that is three blocks and one block; all losses weigh alike.
    """

    config: DSoPEfficientNetConfig

    def __init__(self, config: DSoPEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

    def paper_branches(self) -> PaperBranches:
        """Return two branches, after `blocks.4` and `blocks.6`, the fifth and the seventh stage."""
        return PaperBranches(
            blocks=(0, 0, 0, 0, STAGES["blocks.4"].blocks, 0, STAGES["blocks.6"].blocks),
            widths=(64,) * 7,
            weights=(1.0,) * 7,
            strides=(1,) * 7,
            dropout_rate=0.2,
        )

    def branch_reduction(self, channels: int, width: int) -> nn.Module:
        """Return DR that ends with swish instead of ReLU."""
        return swish_reduction(channels, width)

    def plain(self) -> Backbone:
        """Return the EfficientNet without branches."""
        config = EfficientNetConfig(**shared_fields(self.config, EfficientNetConfig))
        return EfficientNet(config, self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


def dsop_resnet(depth: int) -> Entry:
    """Return the entry of a ResNet that learns with four branches."""
    return Entry(
        network=DSoPResNet,
        config=DSoPResNetConfig,
        defaults={"depth": depth},
        image_size=224,
        num_classes=1000,
        summary=f"DSoP on ResNet-{depth}: four second-order branches, detached before it ships",
    )


EFFICIENTNET_B0 = Entry(
    network=DSoPEfficientNet,
    config=DSoPEfficientNetConfig,
    defaults={},
    image_size=224,
    num_classes=1000,
    summary="DSoP on EfficientNet-b0: two second-order branches, detached before it ships",
)
ENTRIES = {
    **{f"dsop-resnet{depth}": dsop_resnet(depth) for depth in (18, 34, 50, 101)},
    "dsop-efficientnet-b0": EFFICIENTNET_B0,
}
