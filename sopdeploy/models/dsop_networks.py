"""DSoP on the backbones of the catalog and on networks of timm."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
from torch import nn

from sopdeploy.errors import ConfigError
from sopdeploy.models.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.models.backbones.efficientnet import (
    HEAD_CHANNELS,
    MBCONV_STAGES,
    EfficientNet,
    EfficientNetConfig,
    EfficientNetLite,
    EfficientNetLiteConfig,
)
from sopdeploy.models.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches
from sopdeploy.models.timm_networks import PlainTimm, TimmBackbone, TimmConfig

# Table IV, by the number of blocks of a stage
PATTERNS = {3: (1, 0, 2), 4: (0, 2, 0, 2), 18: (0, 0, 3) * 6}


class DSoPResNetConfig(ResNetConfig, DSoPConfig):
    """ResNet for 224-pixel images with branches; conv5_x keeps its size, as in the paper.

    Without this down-sampling the exported network has more multiply-adds than the usual
    ResNet, for example 3.05 G instead of 1.81 G on ResNet-18; `conv5_stride=2` has the usual
    ones.
    """

    conv5_stride: Literal[1, 2] = 1
    aux_stride: Literal["text", "table"] = "text"


class DSoPResNet(DSoP, ResNet):
    """DSoP on ResNet-18/34/50/101: four branches, after conv2_x to conv5_x (section IV-A, Table I).

    Assumption: the branches of ResNet-26 and ResNet-101 are those of ResNet-50.
    """

    inference_class = ResNet
    config: DSoPResNetConfig

    def paper_branches(self) -> PaperBranches:
        """Return four branches of 2 basic blocks, or of 3, 4, 6, 3 bottlenecks.

        With the `aux_stride` "table", those of the paper's table: its strides, and for
        bottlenecks also its blocks (3, 4, 7, 3) and widths.
        """
        # The parameters and FLOPs that the paper prints are of other branches than its text
        # describes.
        table = self.config.aux_stride == "table"
        blocks = (2, 2, 2, 2)
        widths = (64, 128, 256, 256)
        if self.has_bottlenecks:
            blocks = (3, 4, 7, 3) if table else (3, 4, 6, 3)
            widths = (256, 256, 256, 256) if table else (64, 256, 256, 256)

        strides = (1, 2, 2, 1) if table else (1, 1, 1, 1)
        return PaperBranches(blocks, widths, strides=strides)


class DSoPEfficientNetConfig(EfficientNetConfig, DSoPConfig):
    """EfficientNet-b0 with branches."""


class DSoPEfficientNet(DSoP, EfficientNet):
    """DSoP on EfficientNet-b0: two branches, in the middle and at the end (section V-C).

    As in the paper's second-order head for this network, DR to 64 channels ends with swish, and
    dropout of 0.2 precedes the classifier. The branch at the end is this head: it reads the
    1280 channels that the first-order pooling reads, so its loss trains all of the backbone.
    Assumptions, because the paper does not say: the middle is the last block of stride 16, and
    its branch repeats the three blocks of its stage; the branch at the end has no blocks,
    because one MBConv of 1280 channels would have five times the parameters of the whole
    network; all losses have the same weight.
    """

    inference_class = EfficientNet
    branch_activation = nn.SiLU
    config: DSoPEfficientNetConfig

    @property
    def last_map(self) -> tuple[str, int]:
        """The map of the convolution before the pooling."""
        return "conv_head", HEAD_CHANNELS

    def paper_branches(self) -> PaperBranches:
        """Return two branches, of `blocks.4` and `blocks.6`, the fifth and the seventh stage.

        The blocks of the second one say only that it is used.
        """
        return PaperBranches(
            blocks=(
                0,
                0,
                0,
                0,
                MBCONV_STAGES["blocks.4"].blocks,
                0,
                MBCONV_STAGES["blocks.6"].blocks,
            ),
            widths=(64,) * 7,  # a stage with 0 blocks has no branch, so its width is not used
            dropout_rate=0.2,
        )


class DSoPEfficientNetLiteConfig(EfficientNetLiteConfig, DSoPConfig):
    """EfficientNet-Lite with branches."""


class DSoPEfficientNetLite(DSoP, EfficientNetLite):
    """DSoP on EfficientNet-Lite, with the branches of EfficientNet-b0; the paper does not have it.

    One branch follows `blocks.4`, the last stage of stride 16, the other one reads the 1280 channels of
    `conv_head`, right before the pooling.
    """

    inference_class = EfficientNetLite
    config: DSoPEfficientNetLiteConfig

    @property
    def last_map(self) -> tuple[str, int]:
        """The map of the convolution before the pooling."""
        return "conv_head", HEAD_CHANNELS

    def paper_branches(self) -> PaperBranches:
        """Return two branches, of `blocks.4` and `blocks.6`, as on EfficientNet-b0."""
        blocks = len(list(self.get_submodule("blocks.4").children()))
        return PaperBranches(
            blocks=(0, 0, blocks, 1),
            widths=(64,) * 4,  # a stage with 0 blocks has no branch, so its width is not used
            dropout_rate=0.2,
        )


class DSoPThreeStages(DSoP):
    """DSoP on three stages of equal length, with branches by the patterns of Table IV.

    Assumption: stages of a length that is not in `patterns` have one branch of two blocks after
    their last block; a stage of one block has a branch of one block.
    """

    patterns: ClassVar[dict[int, tuple[int, ...]]] = PATTERNS

    def paper_branches(self) -> PaperBranches:
        """Return section V-D's branches, the same in every stage."""
        count = len(list(self.get_submodule("layer1").children()))
        # A pattern has the blocks of several branches in a stage. Without one, a single branch of
        # one or two blocks follows the last block of the stage.
        of_stage = self.patterns[count] if count in self.patterns else min(2, count)

        return PaperBranches(
            blocks=(of_stage,) * 3,
            widths=(128,) * 3,
            weights=(0.1, 0.2, 0.3),
            dropout_rate=0.5,
            dropout_from=128,
        )


class DSoPSmallResNetConfig(SmallResNetConfig, DSoPConfig):
    """ResNet for 32-pixel images with branches."""


class DSoPSmallResNet(DSoPThreeStages, SmallResNet):
    """DSoP on ResNet-20/32/44/56/110 (section V-D: d at most 128, beta .1, .2, .3).

    Assumption, because the paper shows no branches for these: only stages of three blocks have
    a pattern, [1, 0, 2] of the WRN with three blocks per stage.
    """

    inference_class = SmallResNet
    patterns: ClassVar[dict[int, tuple[int, ...]]] = {3: PATTERNS[3]}
    config: DSoPSmallResNetConfig


class DSoPPreActResNetConfig(PreActResNetConfig, DSoPConfig):
    """Pre-activation ResNet or WRN with branches."""


class DSoPPreActResNet(DSoPThreeStages, PreActResNet):
    """DSoP on pre-activation ResNet-110/164 and WRN-22-10/28-10, with the patterns of Table IV.

    Assumption: batch norm and ReLU precede the pooling of a branch, as they precede the
    network's own (the paper does not say; the blocks' output is not normalized).
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


class DSoPTimmConfig(TimmConfig, DSoPConfig):
    """A network of timm with branches.

    `last_branch` is "pooling" if the last branch reads what the pooling reads, and "stage" if it
    reads the last stage, before the convolution that some networks have after it, as in 0.4.
    """

    last_branch: Literal["pooling", "stage"] = "pooling"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_config_of_04(cls, values: Any) -> Any:
        # Checkpoints have all options; those of 0.4 lack this one.
        is_of_04 = isinstance(values, Mapping) and DSoPConfig.model_fields.keys() <= {*values}
        return {"last_branch": "stage", **values} if is_of_04 else values


class DSoPTimm(DSoP, TimmBackbone):
    """DSoP on a network of timm: a branch after every stage from stride 4 on, as on ResNet-18.

    Of a network with a convolution between the last stage and the pooling, such as the EfficientNets, the
    last branch reads the map after it, right before the pooling. Assumptions, because the paper does not
    cover these networks: a branch has two blocks of the kind that `nearest_block` selects, then batch norm
    and ReLU, because many of timm's stages end without either; covariances have at most 256 channels; all
    losses have the same weight.
    """

    inference_class = TimmBackbone
    remove_classifier = PlainTimm.remove_classifier
    taps_are_stages = True
    normalize_branches = True
    config: DSoPTimmConfig

    @property
    def last_map(self) -> tuple[str, int] | None:
        """Name and channels of the map before the pooling, if a convolution after the last stage computes it."""
        channels = self.maps_of_timm.last
        if channels is None or self.config.last_branch == "stage":
            return None
        return "last_map", channels

    def paper_branches(self) -> PaperBranches:
        """Return two blocks and at most 256 channels for every stage; raise `ConfigError` without stages."""
        if not self.tap_channels:
            raise ConfigError(
                f"timm:{self.config.backbone} has no feature maps (batch, "
                "channels, height, width) for branches; choose a network "
                "with named stages"
            )
        return super().paper_branches()
