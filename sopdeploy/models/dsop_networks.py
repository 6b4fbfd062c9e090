"""DSoP on each backbone: where the branches start and what the paper says they are made of.

Adding a backbone: a config that joins the backbone's and `DSoPConfig`, a class that mixes `DSoP` into the
backbone and plans its branches, and a line in `ENTRIES`.
"""

from typing import Literal

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.resnet import BLOCKS, ResNet, ResNetConfig
from sopdeploy.backbones.resnet import STAGES as RESNET_STAGES
from sopdeploy.backbones.small_resnet import STAGES as SMALL_STAGES
from sopdeploy.backbones.small_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.models.dsop import BranchPlan, DSoP, DSoPConfig, PaperBranches, shared_fields, spread
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

    def plan_branches(self) -> list[BranchPlan]:
        """Return four branches of 2 basic blocks, or of 3, 4, 6, 3 bottlenecks."""
        counts = dict(zip(RESNET_STAGES, BLOCKS[self.config.depth], strict=True))
        channels = tuple(self.tap_channels[f"{stage}.{n - 1}"] for stage, n in counts.items())
        table = self.config.aux_stride == "table"
        blocks, widths = (2, 2, 2, 2), (64, 128, 256, 256)
        if self.bottlenecks:
            blocks = (3, 4, 7, 3) if table else (3, 4, 6, 3)
            widths = (256, 256, 256, 256) if table else (64, 256, 256, 256)
        strides = (1, 2, 2, 1) if table else (1, 1, 1, 1)
        paper = PaperBranches(
            blocks=blocks, widths=widths, weights=(1.0,) * 4, channels=channels, strides=strides
        )
        return spread(self.config, counts, paper)

    def plain(self) -> Backbone:
        """Return the ResNet without branches."""
        return ResNet(ResNetConfig(**shared_fields(self.config, ResNetConfig)), self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of conv5_x by default."""
        return self.pooling.out_features


class DSoPSmallResNetConfig(SmallResNetConfig, DSoPConfig):
    """ResNet for 32-pixel images with branches."""


class DSoPSmallResNet(DSoP, SmallResNet):
    """DSoP on ResNet-20/32/44/56/110 (section V-D: d at most 128, beta .1, .2, .3).

    Assumptions, the paper shows no branches for these: three blocks a stage take the pattern
    [1, 0, 2] of the WRN with three, others one branch of 2 blocks after each stage's last block
    (of 1 block where the stage has one).
    """

    config: DSoPSmallResNetConfig

    def __init__(self, config: DSoPSmallResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

    def plan_branches(self) -> list[BranchPlan]:
        """Return the branches of three stages."""
        count = self.config.blocks
        wish: int | tuple[int, ...] = (1, 0, 2) if count == 3 else min(2, count)
        channels = tuple(self.tap_channels[f"{stage}.0"] for stage in SMALL_STAGES)
        paper = PaperBranches(
            blocks=(wish,) * 3,
            widths=(128, 128, 128),
            weights=(0.1, 0.2, 0.3),
            channels=channels,
            strides=(1, 1, 1),
            dropout_at=128,
        )
        return spread(self.config, dict.fromkeys(SMALL_STAGES, count), paper)

    def plain(self) -> Backbone:
        """Return the ResNet without branches."""
        config = SmallResNetConfig(**shared_fields(self.config, SmallResNetConfig))
        return SmallResNet(config, self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of the last stage by default."""
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


def dsop_small_resnet(depth: int) -> Entry:
    """Return the entry of a ResNet for 32-pixel images that learns with branches."""
    return Entry(
        network=DSoPSmallResNet,
        config=DSoPSmallResNetConfig,
        defaults={"depth": depth},
        image_size=32,
        num_classes=10,
        summary=f"DSoP on ResNet-{depth} for 32-pixel images",
    )


ENTRIES = {
    **{f"dsop-resnet{depth}": dsop_resnet(depth) for depth in (18, 34, 50, 101)},
    **{f"dsop-resnet{depth}": dsop_small_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
}
