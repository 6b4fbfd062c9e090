"""Pre-activation ResNet-110/164 and Wide ResNet (WRN) for 32-pixel images.

Papers: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016); Zagoruyko and Komodakis,
"Wide Residual Networks" (BMVC 2016). Three stages of n blocks with 16k, 32k and 64k channels (four times
that with bottlenecks), a stem of 16 channels, batch norm and ReLU after the last stage.
"""

from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.blocks.preactivation import PreActBasicBlock, PreActBottleneck
from sopdeploy.blocks.residual import conv3x3
from sopdeploy.frozen import Frozen
from sopdeploy.pooling.average import GapConfig
from sopdeploy.pooling.choice import Pooling

STAGES = ("layer1", "layer2", "layer3")
STEM_CHANNELS = 16


class PreActResNetConfig(Frozen):
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
