"""ResNet for 32-pixel images: ResNet-20/32/44/56/110 and shallower ones for small pictures.

Paper: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: three
stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers, shortcuts without parameters.
"""

from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.blocks.residual import BasicBlock, conv3x3
from sopdeploy.frozen import Frozen
from sopdeploy.pooling.average import GapConfig
from sopdeploy.pooling.choice import Pooling

STAGES = ("layer1", "layer2", "layer3")


class SmallResNetConfig(Frozen):
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
