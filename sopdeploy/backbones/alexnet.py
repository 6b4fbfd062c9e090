"""AlexNet: five convolutions, a global pooling, a classifier of three layers.

Paper: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (NIPS 2012),
section 3. Where the paper splits the channels over two GPUs, this module has convolutions with two groups.
The slides on iSQRT-COV pool the last feature map, 13 x 13 positions and 256 channels. Images of 224 pixels
are padded by 2, which gives the paper's first map of 55 x 55 positions.
"""

from typing import Literal

from torch import nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.backbones.vgg import vgg_classifier
from sopdeploy.config import FractionBelowOne, StrictModel
from sopdeploy.layers.pooling.base import FlattenConfig
from sopdeploy.layers.pooling.registry import Pooling

_CONVOLUTIONS = (  # channels, kernel, stride, padding, groups
    (96, 11, 4, 2, 1),
    (256, 5, 1, 2, 2),
    (384, 3, 1, 1, 1),
    (384, 3, 1, 1, 2),
    (256, 3, 1, 1, 2),
)
MAX_POOLED = (0, 1)  # positions of the convolutions before a response normalization and a max pooling


class AlexNetConfig(StrictModel):
    """The default pooling is the paper's: max pooling, and the map of 6 x 6 positions as one vector.

    `norm` is the local response normalization after the first two convolutions (section 3.3) or a batch norm
    after each of the five. `classifier` and `dropout` have the same meaning as in `VGGConfig`.
    """

    pooling: Pooling = FlattenConfig(window=3, side=6)
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: FractionBelowOne = 0.5
    norm: Literal["response", "batch"] = "response"


class AlexNet(Backbone):
    """Five convolutions in one stage, global pooling, classifier.

    Assumptions, because the slides do not show the layers: a second-order pooling replaces the last max
    pooling, and the classifier keeps its three layers, as in fast-MPN-COV's VGG-D.
    """

    stem_parts = ()
    stage_names = ("layers",)
    classifier_parts = ("pooling", "classifier")
    config: AlexNetConfig

    def __init__(self, config: AlexNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        layers: list[nn.Module] = []
        channels = 3
        for position, (width, kernel, stride, padding, groups) in enumerate(_CONVOLUTIONS):
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding, groups=groups))
            if config.norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            self.tap_channels[f"layers.{len(layers) - 1}"] = width
            if position in MAX_POOLED:
                if config.norm == "response":
                    layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
                layers.append(nn.MaxPool2d(3, stride=2))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.pooling = config.pooling.build(channels)
        self.classifier = vgg_classifier(self.pooling, config.classifier, config.dropout, num_classes)
        initialize(self)
