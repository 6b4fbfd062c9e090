"""DSoP on the backbones for 32-pixel images (section V-D, Table IV).

Covariances of at most 128 channels, dropout of one half behind those of 128, losses of the three stages
weighted 0.1, 0.2 and 0.3. Branches follow the blocks of a stage in patterns such as [0, 0, 3] x 6: a
branch of three blocks after every third block.
"""

from torch import nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.cifar_resnet import (
    BLOCKS,
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.models.base import Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches, shared_fields
from sopdeploy.models.plain import PREACT_NETWORKS

PATTERNS = {3: (1, 0, 2), 4: (0, 2, 0, 2), 18: (0, 0, 3) * 6}  # Table IV, by the blocks of a stage


def after_the_last(blocks: int) -> int:
    """Return the blocks of the only branch of a stage, where Table IV has no pattern: two, if it has two."""
    return min(2, blocks)


def three_stages(wish: int | tuple[int, ...]) -> PaperBranches:
    """Return section V-D's branches on three stages, with pattern *wish* in each."""
    return PaperBranches(
        blocks=(wish,) * 3,
        widths=(128,) * 3,
        weights=(0.1, 0.2, 0.3),
        strides=(1,) * 3,
        dropout_rate=0.5,
        dropout_from=128,
    )


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

    def paper_branches(self) -> PaperBranches:
        """Return the branches of three stages."""
        count = self.config.blocks
        return three_stages(PATTERNS[3] if count == 3 else after_the_last(count))

    def inference_model(self) -> Backbone:
        """Return the ResNet without branches."""
        config = SmallResNetConfig(**shared_fields(self.config, SmallResNetConfig))
        return SmallResNet(config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


class DSoPPreActResNetConfig(PreActResNetConfig, DSoPConfig):
    """Pre-activation ResNet or WRN with branches."""


class DSoPPreActResNet(DSoP, PreActResNet):
    """DSoP on pre-activation ResNet-110/164 and WRN-22-10/28-10, with the patterns of Table IV.

    Assumptions: batch norm and ReLU stand before the pooling of a branch, as they do before the
    network's own (the paper does not say; the bare stream is not normalised). Stages of other lengths
    than Table IV's get one branch of two blocks after their last block.
    """

    config: DSoPPreActResNetConfig

    def __init__(self, config: DSoPPreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

    def paper_branches(self) -> PaperBranches:
        """Return the branches of three stages."""
        count = self.config.blocks
        return three_stages(PATTERNS.get(count, after_the_last(count)))

    def branch_ending(self, channels: int, /) -> nn.Module:
        """Return batch norm and ReLU."""
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def inference_model(self) -> Backbone:
        """Return the network without branches."""
        config = PreActResNetConfig(**shared_fields(self.config, PreActResNetConfig))
        return PreActResNet(config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


class DSoPResNeXtConfig(ResNeXtConfig, DSoPConfig):
    """ResNeXt-29 with branches."""


class DSoPResNeXt(DSoP, ResNeXt):
    """DSoP on ResNeXt-29 8x64d and 16x64d (the paper's ResNeXt-64-8 and ResNeXt-64-16)."""

    config: DSoPResNeXtConfig

    def __init__(self, config: DSoPResNeXtConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

    def paper_branches(self) -> PaperBranches:
        """Return two branches a stage."""
        return three_stages(PATTERNS[BLOCKS])

    def inference_model(self) -> Backbone:
        """Return the network without branches."""
        return ResNeXt(ResNeXtConfig(**shared_fields(self.config, ResNeXtConfig)), self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


def small_entry(
    network: type[DSoP], config: type[DSoPConfig], defaults: dict[str, int | str], title: str
) -> Entry:
    """Return the entry of a network for 32-pixel images that learns with branches."""
    return Entry(
        network=network,
        config=config,
        defaults=defaults,
        image_size=32,
        num_classes=10,
        summary=f"DSoP on {title} for 32-pixel images",
    )


ENTRIES = {
    **{
        f"dsop-resnet{depth}": small_entry(
            DSoPSmallResNet, DSoPSmallResNetConfig, {"depth": depth}, f"ResNet-{depth}"
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        f"dsop-{name}": small_entry(DSoPPreActResNet, DSoPPreActResNetConfig, defaults, title)
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"dsop-resnext29-{groups}x64d": small_entry(
            DSoPResNeXt, DSoPResNeXtConfig, {"cardinality": groups}, f"ResNeXt-29 {groups}x64d"
        )
        for groups in (8, 16)
    },
}
