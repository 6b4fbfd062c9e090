"""VGG-16 with batch norm, as fast-MPN-COV's VGG-D: without the last max-pooling.

Papers: Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), Table 1, column D;
iSQRT-COV, section 4.3. `layers` is numbered like torchvision's and fast-MPN-COV's `features` (here the name
of a method), `classifier` like fast-MPN-COV's.
"""

from typing import Annotated, Literal

import pydantic
from torch import nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.config import StrictModel
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.layers.pooling.registry import Pooling

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGConfig(StrictModel):
    """`classifier` is the usual one of three layers (4096 wide) or one linear layer, as after fine-tuning."""

    pooling: Pooling = ISqrtPoolingConfig()
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5


class VGG(Backbone):
    """Thirteen 3x3 convolutions in five stages, stride 16, global pooling, classifier."""

    stem_parts = ()
    stage_names = ("layers",)
    classifier_parts = ("pooling", "classifier")
    config: VGGConfig

    def __init__(self, config: VGGConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        layers: list[nn.Module] = []
        channels = 3
        for position, stage in enumerate(STAGES):
            if position > 0:
                layers.append(nn.MaxPool2d(2, stride=2))
            for width in stage:
                layers += _convolution(channels, width, 1)
                self.tap_channels[f"layers.{len(layers) - 1}"] = width
                channels = width
        self.layers = nn.Sequential(*layers)
        self.pooling = config.pooling.build(channels)
        if config.classifier == "linear":
            self.classifier = self.pooling.classifier(num_classes)
        else:
            self.classifier = nn.Sequential(
                nn.Linear(self.pooling.out_features, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(config.dropout),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(config.dropout),
                nn.Linear(4096, num_classes),
            )
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a convolution with batch norm and ReLU."""
        return nn.Sequential(*_convolution(in_channels, out_channels, stride))


def _convolution(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """Build a 3x3 convolution, batch norm and ReLU; the published network has the redundant bias."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
