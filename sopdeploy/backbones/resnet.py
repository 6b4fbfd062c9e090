"""ResNet for 224-pixel images, under torchvision's key names.

Paper: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Table 1.
The second-order papers leave out the last down-sampling: `conv5_stride=1` ("s1").
"""

import math
from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.config import StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import BasicBlock, Bottleneck, conv1x1

BLOCKS = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
WIDTHS = (64, 128, 256, 512)
STAGES = ("layer1", "layer2", "layer3", "layer4")  # the paper's conv2_x .. conv5_x


class ResNetConfig(StrictModel):
    """Depth and the two strides that papers and code disagree on.

    `conv5_stride` 2 is the usual network, 1 the papers'; `bottleneck_stride` says whether the 3x3
    ("v1.5") or the 1x1 convolution ("v1") of a bottleneck strides; `pooling` is the global one.
    """

    depth: Literal[18, 26, 34, 50, 101] = 18
    conv5_stride: Literal[1, 2] = 2
    bottleneck_stride: Literal["v1", "v1.5"] = "v1.5"
    pooling: Pooling = GapConfig()


class ResNet(Backbone):
    """ResNet-18/34 of basic blocks, ResNet-26/50/101 of bottlenecks."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.bottlenecks = config.depth not in {18, 34}
        expansion = Bottleneck.expansion if self.bottlenecks else BasicBlock.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.tap_channels = {}
        channels = 64
        strides = (1, 2, 2, config.conv5_stride)
        for stage, width, blocks, stride in zip(STAGES, WIDTHS, BLOCKS[config.depth], strides, strict=True):
            out_channels = width * expansion
            self.add_module(stage, self.make_stage(channels, out_channels, blocks, stride))
            self.tap_channels |= {f"{stage}.{p}": out_channels for p in range(blocks)}
            channels = out_channels
        self.pooling = config.pooling.build(channels)
        self.fc = self.pooling.classifier(num_classes)
        initialise(self)

    def make_stage(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        """Return a stage whose first block strides."""
        first = self.branch_block(in_channels, out_channels, stride)
        rest = [self.branch_block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return one residual block of this network's kind."""
        if not self.bottlenecks:
            return BasicBlock(in_channels, out_channels, stride)
        stride_on: Literal["1x1", "3x3"] = "1x1" if self.config.bottleneck_stride == "v1" else "3x3"
        return Bottleneck(in_channels, out_channels, stride, stride_on)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the output of conv5_x and of every tapped block."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return run_stages(self, STAGES, x, taps)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of globally pooled features."""
        logits: Tensor = self.fc(self.pooling(features))
        return logits


WIDTHS_LOW_RESOLUTION_RESNET = (16, 32, 64, 128)
RAW_SCALE = 1.0 / 60.0


class LowResolutionResNetConfig(StrictModel):
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
        self.conv1 = nn.Conv2d(3, WIDTHS_LOW_RESOLUTION_RESNET[0], 3, padding=1)
        self.bn1 = nn.BatchNorm2d(WIDTHS_LOW_RESOLUTION_RESNET[0])
        self.relu = nn.ReLU(inplace=True)
        self.tap_channels = {}
        channels = WIDTHS_LOW_RESOLUTION_RESNET[0]
        for stage, base, stride in zip(
            STAGES, WIDTHS_LOW_RESOLUTION_RESNET, (1, 2, 2, config.conv5_stride), strict=True
        ):
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
