"""DSoP on the backbones for 32-pixel images (section V-D, Table IV).

Covariances have at most 128 channels, dropout of 0.5 follows those of 128, and the losses of the three stages
have weights 0.1, 0.2 and 0.3. Branches follow the blocks of a stage in patterns such as [0, 0, 3] x 6: a
branch of three blocks after every third block.
"""

from torch import nn

from sopdeploy.backbones.cifar_resnet import (
    BLOCKS,
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches
from sopdeploy.models.plain import PREACT_NETWORKS, cifar_entry

PATTERNS = {3: (1, 0, 2), 4: (0, 2, 0, 2), 18: (0, 0, 3) * 6}  # Table IV, by the blocks of a stage


def _three_stages(blocks: int | tuple[int, ...]) -> PaperBranches:
    """Return section V-D's branches on three stages, with the pattern *blocks* in each."""
    return PaperBranches(
        blocks=(blocks,) * 3,
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

    Assumptions, because the paper shows no branches for these: stages of three blocks use the pattern
    [1, 0, 2] of the WRN with three, others one branch of 2 blocks after each stage's last block
    (of 1 block where the stage has one).
    """

    inference_class = SmallResNet
    inference_config = SmallResNetConfig
    config: DSoPSmallResNetConfig

    def paper_branches(self) -> PaperBranches:
        """Return the branches of three stages."""
        count = self.config.blocks
        return _three_stages(PATTERNS[3] if count == 3 else min(2, count))


class DSoPPreActResNetConfig(PreActResNetConfig, DSoPConfig):
    """Pre-activation ResNet or WRN with branches."""


class DSoPPreActResNet(DSoP, PreActResNet):
    """DSoP on pre-activation ResNet-110/164 and WRN-22-10/28-10, with the patterns of Table IV.

    Assumptions: batch norm and ReLU precede the pooling of a branch, as they precede the network's own (the
    paper does not say; the blocks' output is not normalized). Stages of other lengths than Table IV's have
    one branch of two blocks after their last block.
    """

    inference_class = PreActResNet
    inference_config = PreActResNetConfig
    config: DSoPPreActResNetConfig

    def paper_branches(self) -> PaperBranches:
        """Return the branches of three stages."""
        count = self.config.blocks
        return _three_stages(PATTERNS.get(count, min(2, count)))

    def branch_ending(self, channels: int, /) -> nn.Module:
        """Build batch norm and ReLU."""
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class DSoPResNeXtConfig(ResNeXtConfig, DSoPConfig):
    """ResNeXt-29 with branches."""


class DSoPResNeXt(DSoP, ResNeXt):
    """DSoP on ResNeXt-29 8x64d and 16x64d (the paper's ResNeXt-64-8 and ResNeXt-64-16)."""

    inference_class = ResNeXt
    inference_config = ResNeXtConfig
    config: DSoPResNeXtConfig

    def paper_branches(self) -> PaperBranches:
        """Return two branches per stage."""
        return _three_stages(PATTERNS[BLOCKS])


ENTRIES = {
    **{
        f"dsop-resnet{depth}": cifar_entry(
            DSoPSmallResNet, DSoPSmallResNetConfig, f"DSoP on ResNet-{depth}", depth=depth
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        f"dsop-{name}": cifar_entry(DSoPPreActResNet, DSoPPreActResNetConfig, f"DSoP on {title}", **defaults)
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"dsop-resnext29-{groups}x64d": cifar_entry(
            DSoPResNeXt, DSoPResNeXtConfig, f"DSoP on ResNeXt-29 {groups}x64d", cardinality=groups
        )
        for groups in (8, 16)
    },
}
