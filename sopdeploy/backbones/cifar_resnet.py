"""ResNet for 32-pixel images: ResNet-20/32/44/56/110 and shallower ones for small pictures.

Paper: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: three
stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers, shortcuts without parameters.
"""

from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.config import StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, conv3x3

STAGES = ("layer1", "layer2", "layer3")


class SmallResNetConfig(StrictModel):
    """Depth (6n + 2), channels of the first stage, how a shortcut changes shape, and the global pooling.

    "pad" is the paper's option A (subsample and zero-pad, no parameters), "projection" option B.
    """

    depth: Annotated[int, pydantic.Field(ge=8)] = 20
    base_width: Annotated[int, pydantic.Field(ge=1)] = 16
    shortcut: Literal["pad", "projection"] = "pad"
    pooling: Pooling = GapConfig()

    @pydantic.field_validator("depth")
    @classmethod
    def _six_n_plus_two(cls, depth: int) -> int:
        if (depth - 2) % 6:
            raise ValueError("depth must be 6n + 2, such as 8, 20, 32, 44, 56 or 110")
        return depth

    @property
    def blocks(self) -> int:
        """Return n, the number of blocks of a stage."""
        return (self.depth - 2) // 6


class SmallResNet(Backbone):
    """Stem without pooling, three stages, global pooling, one linear layer."""

    config: SmallResNetConfig

    def __init__(self, config: SmallResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        widths = [config.base_width * factor for factor in (1, 2, 4)]
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.tap_channels = {}
        channels = widths[0]
        for stage, width, stride in zip(STAGES, widths, (1, 2, 2), strict=True):
            first = self.branch_block(channels, width, stride)
            rest = [self.branch_block(width, width, 1) for _ in range(config.blocks - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
            self.tap_channels |= {f"{stage}.{p}": width for p in range(config.blocks)}
            channels = width
        self.pooling = config.pooling.build(channels)
        self.fc = self.pooling.classifier(num_classes)
        initialise(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return one basic block with this network's shortcut."""
        return BasicBlock(in_channels, out_channels, stride, self.config.shortcut)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the output of the last stage and of every tapped block."""
        x = self.relu(self.bn1(self.conv1(images)))
        return run_stages(self, STAGES, x, taps)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of globally pooled features."""
        logits: Tensor = self.fc(self.pooling(features))
        return logits


STEM_CHANNELS = 16


class PreActResNetConfig(StrictModel):
    """Size of the network: `blocks` is n, the blocks of a stage; `widen` is k.

    ResNet-110 is 18 basic blocks a stage, ResNet-164 18 bottlenecks, WRN-22-10 and WRN-28-10 three and
    four basic blocks, widened by 10. `last_stride=1` leaves out the last down-sampling (GSoP, Table 6);
    `pooling` is the global one.
    """

    blocks: Annotated[int, pydantic.Field(ge=1)] = 18
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widen: Annotated[int, pydantic.Field(ge=1)] = 1
    last_stride: Literal[1, 2] = 2
    pooling: Pooling = GapConfig()


class PreActResNet(Backbone):
    """Stem without pooling, three stages, batch norm, ReLU, global average, one linear layer.

    Assumption: ResNet-110's shortcuts between stages are projections as well.
    """

    config: PreActResNetConfig

    def __init__(self, config: PreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        expansion = PreActBottleneck.expansion if config.block == "bottleneck" else 1
        widths = [STEM_CHANNELS * config.widen * factor * expansion for factor in (1, 2, 4)]
        self.conv1 = conv3x3(3, STEM_CHANNELS)
        self.tap_channels = {}
        channels = STEM_CHANNELS
        for stage, width, stride in zip(STAGES, widths, (1, 2, config.last_stride), strict=True):
            first = self.branch_block(channels, width, stride)
            rest = [self.branch_block(width, width, 1) for _ in range(config.blocks - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
            self.tap_channels |= {f"{stage}.{p}": width for p in range(config.blocks)}
            channels = width
        self.bn = nn.BatchNorm2d(channels)
        self.pooling = config.pooling.build(channels)
        self.fc = self.pooling.classifier(num_classes)
        initialise(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return one pre-activation block of this network's kind."""
        if self.config.block == "bottleneck":
            return PreActBottleneck(in_channels, out_channels, stride)
        return PreActBasicBlock(in_channels, out_channels, stride)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the activated output of the last stage, and that of every tapped block as it is."""
        x, tapped = run_stages(self, STAGES, self.conv1(images), taps)
        return F.relu(self.bn(x)), tapped

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of globally pooled features."""
        logits: Tensor = self.fc(self.pooling(features))
        return logits


WIDTHS = (256, 512, 1024)
BLOCKS = 3


class ResNeXtConfig(StrictModel):
    """Groups of the 3x3 convolution, the channels of each group in the first stage, the pooling."""

    cardinality: Annotated[int, pydantic.Field(ge=1)] = 8
    group_width: Annotated[int, pydantic.Field(ge=1)] = 64
    pooling: Pooling = GapConfig()


class ResNeXt(Backbone):
    """Stem without pooling, three stages of bottlenecks with grouped convolutions, one linear layer."""

    config: ResNeXtConfig

    def __init__(self, config: ResNeXtConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.tap_channels = {}
        channels = 64
        for stage, width, stride in zip(STAGES, WIDTHS, (1, 2, 2), strict=True):
            first = self.branch_block(channels, width, stride)
            rest = [self.branch_block(width, width, 1) for _ in range(BLOCKS - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
            self.tap_channels |= {f"{stage}.{p}": width for p in range(BLOCKS)}
            channels = width
        self.pooling = config.pooling.build(channels)
        self.fc = self.pooling.classifier(num_classes)
        initialise(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return one bottleneck whose groups are as wide as in the stage of *out_channels*."""
        groups, width = self.config.cardinality, self.config.group_width
        middle = groups * width * out_channels // WIDTHS[0]
        return Bottleneck(in_channels, out_channels, stride, middle=middle, groups=groups)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the output of the last stage and of every tapped block."""
        x = self.relu(self.bn1(self.conv1(images)))
        return run_stages(self, STAGES, x, taps)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of globally pooled features."""
        logits: Tensor = self.fc(self.pooling(features))
        return logits
