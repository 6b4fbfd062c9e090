"""AlexNet and VGG-16: convolutions in one stage, a global pooling, a classifier of three layers or one.

Papers: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks"
(NIPS 2012), section 3; Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015),
Table 1, column D; iSQRT-COV, section 4.3.

Where the paper of AlexNet splits the channels over two GPUs, this module has convolutions with
two groups. The slides on iSQRT-COV pool the last feature map, 13 x 13 positions and 256
channels. Images of 224 pixels are padded by 2, which gives the paper's first map of 55 x 55
positions.

As in fast-MPN-COV's VGG-D, batch norm is the default of VGG-16, and the global pooling replaces
the last max pooling. With the pooling `flatten`, the network is torchvision's `vgg16_bn`, or
`vgg16` without batch norm. The modules in `layers` and `classifier` have the numbers that
torchvision and fast-MPN-COV use in `features` and `classifier`.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from sopdeploy.base.config import FractionBelowOne, StrictModel
from sopdeploy.layers.pooling.base import FlattenConfig, GlobalPooling
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.backbones.base import Backbone, initialize

VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096  # width of the usual classifier of three layers
# channels, kernel, stride, padding, groups
_CONVOLUTIONS = (
    (96, 11, 4, 2, 1),
    (256, 5, 1, 2, 2),
    (384, 3, 1, 1, 1),
    (384, 3, 1, 1, 2),
    (256, 3, 1, 1, 2),
)
# Positions of convolutions that response normalization and max pooling follow
MAX_POOLED = (0, 1)


class VGGConfig(StrictModel):
    """`classifier` is "mlp", the usual three layers (4096 wide), or "linear", one layer, as for fine-tuning.

    `batch_norm` adds a batch norm after every convolution; the paper has none.
    """

    pooling: Pooling = ISqrtPoolingConfig()
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: FractionBelowOne = 0.5
    batch_norm: bool = True


class AlexNetConfig(StrictModel):
    """The default pooling is the paper's: max pooling, and the map of 6 x 6 positions as one vector.

    `classifier` and `dropout` have the same meaning as in `VGGConfig`.
    """

    pooling: Pooling = FlattenConfig(window=3, side=6)
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: FractionBelowOne = 0.5


class SingleStage(Backbone):
    """The stage `layers`, whose activations can be tapped, a global pooling, a classifier."""

    stem_parts = ()
    stage_names = ("layers",)
    classifier_parts = ("pooling", "classifier")
    config: VGGConfig | AlexNetConfig

    def __init__(
        self, config: VGGConfig | AlexNetConfig, num_classes: int, layers: Sequence[nn.Module]
    ) -> None:
        super().__init__(config, num_classes)

        # Branches can read the map after each ReLU.
        channels = 0  # of the last convolution so far
        for position, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                channels = layer.out_channels
            elif isinstance(layer, nn.ReLU):
                self.tap_channels[f"layers.{position}"] = channels
        self.layers = nn.Sequential(*layers)

        self.pooling: GlobalPooling = config.pooling.build(channels)
        self.classifier: nn.Module
        if config.classifier == "linear":
            self.classifier = nn.Linear(self.pooling.out_features, num_classes)
        else:
            self.classifier = nn.Sequential(
                nn.Linear(self.pooling.out_features, HIDDEN),
                nn.ReLU(inplace=True),
                nn.Dropout(config.dropout),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ReLU(inplace=True),
                nn.Dropout(config.dropout),
                nn.Linear(HIDDEN, num_classes),
            )

        initialize(self)


class VGG(SingleStage):
    """Thirteen 3x3 convolutions in five stages, stride 16, global pooling, classifier."""

    def __init__(self, config: VGGConfig, num_classes: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for position, stage in enumerate(VGG_STAGES):
            if position > 0:
                layers.append(nn.MaxPool2d(2, stride=2))

            for width in stage:
                # The bias has no effect before a batch norm, but the published weights contain
                # it.
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if config.batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))

                channels = width
        super().__init__(config, num_classes, layers)


class AlexNet(SingleStage):
    """Five convolutions in one stage, global pooling, classifier.

    Assumptions, because the slides do not show the layers: a second-order pooling replaces the
    last max pooling, and the classifier keeps its three layers, as in fast-MPN-COV's VGG-D.
    """

    def __init__(self, config: AlexNetConfig, num_classes: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for position, (width, kernel, stride, padding, groups) in enumerate(_CONVOLUTIONS):
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding, groups=groups))
            layers.append(nn.ReLU(inplace=True))
            if position in MAX_POOLED:
                layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
                layers.append(nn.MaxPool2d(3, stride=2))

            channels = width
        super().__init__(config, num_classes, layers)
