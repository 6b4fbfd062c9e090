"""DSoP on the backbones for 32-pixel images (section V-D, Table IV).

Covariances have at most 128 channels, dropout of 0.5 follows those of 128, and the losses of the three stages
have weights 0.1, 0.2 and 0.3. Branches follow the blocks of a stage in patterns such as [0, 0, 3] x 6: a
branch of three blocks after every third block.

Section V-D prints vectors of 2K, 4K and 4K for the branches of the three stages, with ResNet-110 as the
example, where dropout keeps half of the elements. The stages of ResNet-110 have 16, 32 and 64 channels, so
its vectors have 136, 528 and 2,080 elements. Only ResNet-164 fits, with 2,080, 8,256 and 8,256.
"""

from typing import ClassVar

from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.models.base import Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches
from sopdeploy.models.plain import PREACT_NETWORKS

PATTERNS = {3: (1, 0, 2), 4: (0, 2, 0, 2), 18: (0, 0, 3) * 6}  # Table IV, by the number of blocks of a stage


class DSoPThreeStages(DSoP):
    """DSoP on three stages of equal length, with branches by the patterns of Table IV.

    Stages of a length that is not in `patterns` have one branch of two blocks after their last block; a stage
    of one block has a branch of one block.
    """

    patterns: ClassVar[dict[int, tuple[int, ...]]] = PATTERNS

    def paper_branches(self) -> PaperBranches:
        """Return section V-D's branches, the same in every stage."""
        count = len(list(self.get_submodule("layer1").children()))
        return PaperBranches(
            blocks=(self.patterns.get(count, min(2, count)),) * 3,
            widths=(128,) * 3,
            weights=(0.1, 0.2, 0.3),
            dropout_rate=0.5,
            dropout_from=128,
        )


class DSoPSmallResNetConfig(SmallResNetConfig, DSoPConfig):
    """ResNet for 32-pixel images with branches."""


class DSoPSmallResNet(DSoPThreeStages, SmallResNet):
    """DSoP on ResNet-20/32/44/56/110 (section V-D: d at most 128, beta .1, .2, .3).

    Assumptions, because the paper shows no branches for these: stages of three blocks use the pattern
    [1, 0, 2] of the WRN with three blocks per stage. Other stages have one branch of two blocks after their
    last block (of one block if the stage has one block).
    """

    inference_class = SmallResNet
    patterns: ClassVar[dict[int, tuple[int, ...]]] = {3: PATTERNS[3]}
    config: DSoPSmallResNetConfig


class DSoPPreActResNetConfig(PreActResNetConfig, DSoPConfig):
    """Pre-activation ResNet or WRN with branches."""


class DSoPPreActResNet(DSoPThreeStages, PreActResNet):
    """DSoP on pre-activation ResNet-110/164 and WRN-22-10/28-10, with the patterns of Table IV.

    Assumptions: batch norm and ReLU precede the pooling of a branch, as they precede the network's own (the
    paper does not say; the blocks' output is not normalized). Stages of other lengths than Table IV's have
    one branch of two blocks after their last block.
    """

    inference_class = PreActResNet
    normalize_branches = True
    config: DSoPPreActResNetConfig


class DSoPResNeXtConfig(ResNeXtConfig, DSoPConfig):
    """ResNeXt-29 with branches."""


class DSoPResNeXt(DSoPThreeStages, ResNeXt):
    """DSoP on ResNeXt-29 8x64d and 16x64d (the paper's ResNeXt-64-8 and ResNeXt-64-16)."""

    inference_class = ResNeXt
    config: DSoPResNeXtConfig


ENTRIES = {
    **{
        f"dsop-resnet{depth}": Entry.at_32(
            DSoPSmallResNet, DSoPSmallResNetConfig, {"depth": depth}, f"DSoP on ResNet-{depth}"
        )
        for depth in (8, 20)
    },
    **{
        f"dsop-{name}": Entry.at_32(DSoPPreActResNet, DSoPPreActResNetConfig, defaults, f"DSoP on {title}")
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"dsop-resnext29-{n}x64d": Entry.at_32(
            DSoPResNeXt, DSoPResNeXtConfig, {"cardinality": n}, f"DSoP on ResNeXt-29 {n}x64d"
        )
        for n in (8, 16)
    },
}
