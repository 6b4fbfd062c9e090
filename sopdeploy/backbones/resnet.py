"""ResNet for 224-pixel images, under torchvision's key names.

Paper: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Table 1.
The second-order papers leave out the last down-sampling: `conv5_stride=1` ("s1").
"""

from collections.abc import Collection
from typing import Literal

from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.blocks.residual import BasicBlock, Bottleneck
from sopdeploy.frozen import Frozen
from sopdeploy.pooling.average import GapConfig
from sopdeploy.pooling.choice import Pooling

BLOCKS = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
WIDTHS = (64, 128, 256, 512)
STAGES = ("layer1", "layer2", "layer3", "layer4")  # the paper's conv2_x .. conv5_x


class ResNetConfig(Frozen):
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
