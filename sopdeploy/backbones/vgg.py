"""VGG-16 with batch norm, as fast-MPN-COV's VGG-D has it: without the last max-pooling.

Papers: Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), Table 1, column D;
iSQRT-COV, section 4.3. `layers` is numbered as torchvision's and fast-MPN-COV's `features` (which is the
name of a backbone's method here), `classifier` as fast-MPN-COV's.
"""

from collections.abc import Collection
from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise, run_stages
from sopdeploy.config import StrictModel
from sopdeploy.layers.pooling.isqrt import ISqrtPoolingConfig
from sopdeploy.layers.pooling.registry import Pooling

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGConfig(StrictModel):
    """`classifier` is the usual one of three layers (4096 wide) or one linear layer, as after fine-tuning."""

    pooling: Pooling = ISqrtPoolingConfig()
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5


class VGG(Backbone):
    """Thirteen 3x3 convolutions in five stages, stride 16, global pooling, classifier."""

    config: VGGConfig

    def __init__(self, config: VGGConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.layers, self.tap_channels = convolutions()
        channels = STAGES[-1][-1]
        self.pooling = config.pooling.build(channels)
        self.classifier = self.make_classifier()
        initialise(self)

    def make_classifier(self) -> nn.Module:
        """Return one linear layer, or three with ReLU and dropout between them."""
        if self.config.classifier == "linear":
            return self.pooling.classifier(self.num_classes)
        return nn.Sequential(
            nn.Linear(self.pooling.out_features, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(self.config.dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(self.config.dropout),
            nn.Linear(4096, self.num_classes),
        )

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return a convolution with batch norm and ReLU."""
        return nn.Sequential(*convolution(in_channels, out_channels, stride))

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the output of the last convolution and of every tapped ReLU."""
        return run_stages(self, ("layers",), images, taps)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of globally pooled features."""
        logits: Tensor = self.classifier(self.pooling(features))
        return logits


def convolutions() -> tuple[nn.Sequential, dict[str, int]]:
    """Return the layers before the global pooling, and the channels after each ReLU."""
    layers: list[nn.Module] = []
    tap_channels = {}
    channels = 3
    for position, stage in enumerate(STAGES):
        if position > 0:
            layers.append(nn.MaxPool2d(2, stride=2))
        for width in stage:
            layers += convolution(channels, width, 1)
            tap_channels[f"layers.{len(layers) - 1}"] = width
            channels = width
    return nn.Sequential(*layers), tap_channels


def convolution(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """Return a 3x3 convolution with bias, as published though batch norm follows, batch norm and ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
