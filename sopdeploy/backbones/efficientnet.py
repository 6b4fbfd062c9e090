"""EfficientNet-b0 for 224-pixel images, with timm's state-dict keys.

Paper: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019),
Table 1.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.config import FractionBelowOne, StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import DepthwiseSeparable, MBConv, conv1x1


class Stage(NamedTuple):
    """One row of the paper's Table 1; only the first block of the stage has `stride`."""

    kernel: int
    stride: int
    channels: int
    blocks: int


STAGES = {
    "blocks.0": Stage(3, 1, 16, 1),
    "blocks.1": Stage(3, 2, 24, 2),
    "blocks.2": Stage(5, 2, 40, 2),
    "blocks.3": Stage(3, 2, 80, 3),
    "blocks.4": Stage(5, 1, 112, 3),
    "blocks.5": Stage(5, 2, 192, 4),
    "blocks.6": Stage(3, 1, 320, 1),
}
KERNELS = {stage.channels: stage.kernel for stage in STAGES.values()}
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280


class EfficientNetConfig(StrictModel):
    """Regularization: dropout before the classifier, and the stochastic depth of the last block.

    The drop probability of the blocks before the last one is lower, in proportion to their depth.
    """

    dropout: FractionBelowOne = 0.2
    stochastic_depth: FractionBelowOne = 0.2
    pooling: Pooling = GapConfig()


class EfficientNet(Backbone):
    """Stem, seven stages, a 1x1 convolution to 1280 channels, global pooling, one linear layer."""

    stem_parts = ()
    stage_names = tuple(STAGES)
    classifier_parts: tuple[str, ...] = ("pooling", "dropout", "classifier")
    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv_stem = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.blocks = nn.Sequential()
        channels, depth = STEM_CHANNELS, 0
        total = sum(stage.blocks for stage in STAGES.values())
        for name, stage in STAGES.items():
            blocks = nn.Sequential()
            for position in range(stage.blocks):
                kind = DepthwiseSeparable if name == "blocks.0" else MBConv
                stride = stage.stride if position == 0 else 1
                drop = config.stochastic_depth * depth / total
                blocks.append(kind(channels, stage.channels, stage.kernel, stride, drop))
                self.tap_channels[f"{name}.{position}"] = stage.channels
                channels, depth = stage.channels, depth + 1
            self.blocks.append(blocks)
        self.conv_head = conv1x1(channels, HEAD_CHANNELS)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.dropout = nn.Dropout(config.dropout)
        self.pooling = config.pooling.build(HEAD_CHANNELS)
        self.classifier = self.pooling.classifier(num_classes)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build an MBConv with the kernel of the stage of *out_channels*, without stochastic depth."""
        return MBConv(in_channels, out_channels, KERNELS[out_channels], stride)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map (B, 1280, h, w) after its activation, and the outputs of *taps*.

        A tap is a block, or `conv_head` for the last feature map itself.
        """
        x, tapped = super().features(F.silu(self.bn1(self.conv_stem(images))), taps)
        last = F.silu(self.bn2(self.conv_head(x)))
        return last, [*tapped, last] if "conv_head" in taps else tapped
