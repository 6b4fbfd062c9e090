"""ResNets with four stages: for 224-pixel images with torchvision's state-dict keys, and for 64-pixel images.

Paper: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Table 1.
The second-order papers remove the last down-sampling: `conv5_stride=1` ("s1").
"""

import math
from typing import Literal

from torch import nn

from sopdeploy.base.config import Count, StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import BasicBlock, Bottleneck
from sopdeploy.models.backbones.base import Backbone, initialize

# The residual blocks of the four stages, by depth
BLOCKS = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
BASE_WIDTH = 64
STAGES = ("layer1", "layer2", "layer3", "layer4")  # the paper's conv2_x .. conv5_x
LOW_RESOLUTION_WIDTHS = (16, 32, 64, 128)


class ResNetConfig(StrictModel):
    """Depth, global pooling, and the two strides on which papers and code differ.

    `conv5_stride` is 2 in the usual network and 1 in the second-order papers.
    `bottleneck_stride` selects which convolution of a bottleneck has the stride: the 3x3
    ("v1.5") or the first 1x1 ("v1"). `base_width` is the number of channels of conv1 and of the
    3x3 convolutions of conv2_x; a stored config omits the default.
    """

    depth: Literal[18, 26, 34, 50, 101] = 18
    conv5_stride: Literal[1, 2] = 2
    bottleneck_stride: Literal["v1", "v1.5"] = "v1.5"
    base_width: Count = BASE_WIDTH
    pooling: Pooling = GapConfig()


class ResNet(Backbone):
    """ResNet-18/34 of basic blocks, ResNet-26/50/101 of bottlenecks."""

    stem_parts = ("conv1", "bn1", "relu", "maxpool")
    stage_names = STAGES
    config: ResNetConfig

    def __init__(self, config: ResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.has_bottlenecks = config.depth not in {18, 34}
        expansion = Bottleneck.expansion if self.has_bottlenecks else BasicBlock.expansion
        channels = config.base_width

        # The stem, which reduces the side to a quarter.
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        # Four stages, then the pooling and the classifier.
        widths = [config.base_width * factor * expansion for factor in (1, 2, 4, 8)]
        self.add_stages(channels, widths, BLOCKS[config.depth], (1, 2, 2, config.conv5_stride))
        self.add_classifier(config.pooling)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a residual block of this network's kind."""
        if not self.has_bottlenecks:
            return BasicBlock(in_channels, out_channels, stride)
        stride_on: Literal["1x1", "3x3"] = (
            "1x1" if self.config.bottleneck_stride == "v1" else "3x3"
        )
        return Bottleneck(in_channels, out_channels, stride, stride_on)


class LowResolutionResNetConfig(StrictModel):
    """Depth (`blocks_per_stage`), width (`widen`), and the stride on which GM-SOP's paper and code differ.

    The released code takes images of 0..255 minus the mean, and conv1 has 60 times smaller
    weights and a 3600 times lower learning rate. Images that are divided by 60 are equivalent
    except for the weight decay.
    """

    blocks_per_stage: Count = 2
    widen: Count = 1
    conv5_stride: Literal[1, 2] = 2


class LowResolutionResNet(Backbone):
    """GM-SOP's stem and stages, (B, 3, H, W) to (B, 128 * widen, h, w), before pooling and classifier."""

    stage_names = STAGES
    config: LowResolutionResNetConfig

    def __init__(self, config: LowResolutionResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)

        channels = LOW_RESOLUTION_WIDTHS[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

        widths = [base * config.widen for base in LOW_RESOLUTION_WIDTHS]
        self.add_stages(
            channels, widths, [config.blocks_per_stage] * 4, (1, 2, 2, config.conv5_stride)
        )
        self.channels = widths[-1]
        initialize_by_fan_in(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a basic block."""
        return BasicBlock(in_channels, out_channels, stride)


def initialize_by_fan_in(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan in), as in GM-SOP's released code; biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
