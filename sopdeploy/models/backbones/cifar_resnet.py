"""ResNets for 32-pixel images: ResNet-20/32/44/56/110, pre-activation ResNet, WRN and ResNeXt-29.

Papers: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2:
three stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers, shortcuts without
parameters; He et al., "Identity Mappings" (ECCV 2016); Zagoruyko and Komodakis, "Wide Residual
Networks" (2016); Xie et al. (2017).
"""

from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.base.config import Count, StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    conv3x3,
)
from sopdeploy.models.backbones.base import Backbone, initialize

_STEM_CHANNELS = 16  # of pre-activation networks
WIDTHS = (256, 512, 1024)  # of ResNeXt
RESNEXT_BLOCKS = 3  # of each stage of ResNeXt


class SmallResNetConfig(StrictModel):
    """Depth (6n + 2), channels of the first stage, kind of shortcut, and the global pooling.

    Shortcut "pad" is the paper's option A (subsample and zero-pad, no parameters), "projection"
    option B.
    """

    depth: Annotated[int, pydantic.Field(ge=8)] = 20
    base_width: Count = 16
    shortcut: Literal["pad", "projection"] = "pad"
    pooling: Pooling = GapConfig()

    @pydantic.field_validator("depth")
    @classmethod
    def _six_n_plus_two(cls, depth: int) -> int:
        if (depth - 2) % 6:
            raise ValueError("depth must be 6n + 2, such as 8, 20, 32, 44, 56 or 110")
        return depth


class SmallResNet(Backbone):
    """Stem without pooling, three stages, global pooling, one linear layer."""

    config: SmallResNetConfig

    def __init__(self, config: SmallResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        widths = [config.base_width * factor for factor in (1, 2, 4)]
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)

        self.add_stages(widths[0], widths, [(config.depth - 2) // 6] * 3, (1, 2, 2))
        self.add_classifier(config.pooling)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a basic block with this network's shortcut."""
        return BasicBlock(in_channels, out_channels, stride, self.config.shortcut)


class PreActResNetConfig(StrictModel):
    """Size of the network: `blocks` is n, the blocks per stage; `widen` is k, the factor of all channels.

    ResNet-110 has 18 basic blocks per stage, ResNet-164 18 bottlenecks, WRN-22-10 and WRN-28-10
    three and four basic blocks, widened by 10. `last_stride=1` removes the last down-sampling
    (GSoP, Table 6); `pooling` is the global pooling.
    """

    blocks: Count = 18
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widen: Count = 1
    last_stride: Literal[1, 2] = 2
    pooling: Pooling = GapConfig()


class PreActResNet(Backbone):
    """Stem without pooling, three stages, batch norm, ReLU, global pooling, one linear layer.

    Assumption: ResNet-110's shortcuts between stages are projections as well.
    """

    stem_parts = ("conv1",)
    config: PreActResNetConfig

    def __init__(self, config: PreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        expansion = PreActBottleneck.expansion if config.block == "bottleneck" else 1
        widths = [_STEM_CHANNELS * config.widen * factor * expansion for factor in (1, 2, 4)]
        self.conv1 = conv3x3(3, _STEM_CHANNELS)
        self.add_stages(_STEM_CHANNELS, widths, [config.blocks] * 3, (1, 2, config.last_stride))
        self.bn = nn.BatchNorm2d(widths[-1])

        self.add_classifier(config.pooling)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a pre-activation block of this network's kind."""
        kind = PreActBottleneck if self.config.block == "bottleneck" else PreActBasicBlock
        return kind(in_channels, out_channels, stride)

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the activated last feature map, and the output of tapped blocks before activation."""
        x, tapped = super().feature_maps(images, taps)
        return F.relu(self.bn(x)), tapped


class ResNeXtConfig(StrictModel):
    """Groups of the 3x3 convolution, channels of each group in the first stage, and the global pooling."""

    cardinality: Count = 8
    group_width: Count = 64
    pooling: Pooling = GapConfig()


class ResNeXt(Backbone):
    """Stem without pooling, three stages of bottlenecks with grouped convolutions, one linear layer."""

    config: ResNeXtConfig

    def __init__(self, config: ResNeXtConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)

        self.add_stages(64, WIDTHS, [RESNEXT_BLOCKS] * 3, (1, 2, 2))
        self.add_classifier(config.pooling)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a bottleneck whose groups are as wide as in the stage of *out_channels*."""
        groups = self.config.cardinality
        first_width = self.config.group_width
        # Groups widen in proportion to the channels, from `group_width` in the first stage.
        middle = groups * first_width * out_channels // WIDTHS[0]
        return Bottleneck(in_channels, out_channels, stride, middle=middle, groups=groups)
