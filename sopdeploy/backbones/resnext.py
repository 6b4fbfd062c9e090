"""ResNeXt-29 for 32-pixel images, 8x64d and 16x64d.

Paper: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks" (CVPR 2017), section
5.2: a stem of 64 channels, three stages of three bottlenecks with 256, 512 and 1024 channels; the 3x3
convolution has `cardinality` groups of `group_width` channels, twice as many at each stage.
"""

from collections.abc import Collection
from typing import Annotated

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.blocks.residual import Bottleneck, conv3x3
from sopdeploy.frozen import Frozen
from sopdeploy.pooling.average import GapConfig
from sopdeploy.pooling.choice import Pooling

STAGES = ("layer1", "layer2", "layer3")
WIDTHS = (256, 512, 1024)
BLOCKS = 3


class ResNeXtConfig(Frozen):
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
