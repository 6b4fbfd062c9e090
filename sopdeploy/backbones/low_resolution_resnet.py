"""ResNet and WRN for pictures of 64 (or 96) pixels: no pooling in the stem, four narrow stages.

Paper: Wang et al., "Global Gated Mixture of Second-order Pooling" (GM-SOP, NeurIPS 2018), Table 1;
WRN-36-k is that of Chrabaszcz et al., "A downsampled variant of ImageNet" (2017).
Letters: n blocks per stage, k widening factor.

ResNet-18 and -50 have 8n + 2 layers (n = 2, 6), WRN-36-k has 8n + 4 (n = 4). All blocks are basic
ones with the activation after the addition, as the released code has them for WRN too.

Where paper and released code differ: the paper halves the map in conv5_x, the released second-order
networks do not (`conv5_stride`); the released networks see 0..255 less the mean (`input_scaling`).
"""

import math
from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, run_stages
from sopdeploy.blocks.residual import BasicBlock, conv1x1
from sopdeploy.frozen import Frozen

STAGES = ("layer1", "layer2", "layer3", "layer4")  # the paper's conv2_x .. conv5_x
WIDTHS = (16, 32, 64, 128)
RAW_SCALE = 1.0 / 60.0


class LowResolutionResNetConfig(Frozen):
    """n, k, and the switches that paper and code disagree on.

    `project_first_stage` gives conv2_x a projection even where its channels do not change, as the
    released WRN has it (only WRN-36-1 is touched). `input_scaling="raw"` takes images of 0..255 less
    the mean and divides by 60 before conv1: the released conv1, whose weights start 60 times smaller
    and learn 3600 times slower, learns the same function but for its weight decay.
    """

    blocks_per_stage: Annotated[int, pydantic.Field(ge=1)] = 2
    widen: Annotated[int, pydantic.Field(ge=1)] = 1
    conv5_stride: Literal[1, 2] = 2
    project_first_stage: bool = False
    input_scaling: Literal["standardised", "raw"] = "standardised"


class LowResolutionResNet(Backbone):
    """Stem and stages, (B, 3, H, W) to (B, 128k, h, w); what follows them is the network's own."""

    config: LowResolutionResNetConfig

    def __init__(self, config: LowResolutionResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.tap_channels = {}
        channels = WIDTHS[0]
        for stage, base, stride in zip(STAGES, WIDTHS, (1, 2, 2, config.conv5_stride), strict=True):
            width = base * config.widen
            first = BasicBlock(channels, width, stride)
            if config.project_first_stage and first.downsample is None:
                first.downsample = nn.Sequential(conv1x1(channels, width), nn.BatchNorm2d(width))
            rest = [self.branch_block(width, width, 1) for _ in range(config.blocks_per_stage - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
            self.tap_channels |= {f"{stage}.{p}": width for p in range(config.blocks_per_stage)}
            channels = width
        self.channels = channels
        initialise_by_fan_in(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return one basic block."""
        return BasicBlock(in_channels, out_channels, stride)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the output of conv5_x and of every tapped block."""
        if self.config.input_scaling == "raw":
            images = images * RAW_SCALE
        x = self.relu(self.bn1(self.conv1(images)))
        return run_stages(self, STAGES, x, taps)


def initialise_by_fan_in(network: nn.Module) -> None:
    """Give every convolution of *network* N(0, 2 / fan in) weights, the released code's, and no bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
