"""VGG-16: thirteen convolutions, a global pooling, a classifier of three layers or one.

Papers: Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), Table 1, column D;
iSQRT-COV, section 4.3. As in fast-MPN-COV's VGG-D, batch norm is the default and the global pooling replaces
the last max pooling. With the pooling `flatten`, the network is torchvision's `vgg16_bn`, or `vgg16` without
batch norm. The modules in `layers` and `classifier` have the numbers that torchvision and fast-MPN-COV use in
`features` and `classifier`.
"""

from typing import Literal

from torch import nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.config import FractionBelowOne, StrictModel
from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.layers.pooling.registry import Pooling

VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096  # width of the usual classifier of three layers


class VGGConfig(StrictModel):
    """`classifier` is "mlp", the usual three layers (4096 wide), or "linear", one layer, as for fine-tuning.

    `batch_norm` adds a batch norm after every convolution; the paper has none.
    """

    pooling: Pooling = ISqrtPoolingConfig()
    classifier: Literal["mlp", "linear"] = "mlp"
    dropout: FractionBelowOne = 0.5
    batch_norm: bool = True


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
        for position, stage in enumerate(VGG_STAGES):
            if position > 0:
                layers.append(nn.MaxPool2d(2, stride=2))
            for width in stage:
                # The bias has no effect before a batch norm, but the published weights contain it.
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if config.batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                self.tap_channels[f"layers.{len(layers) - 1}"] = width
                channels = width
        self.layers = nn.Sequential(*layers)
        self.pooling = config.pooling.build(channels)
        self.classifier = vgg_classifier(self.pooling, config.classifier, config.dropout, num_classes)
        initialize(self)


def vgg_classifier(
    pooling: GlobalPooling, kind: Literal["mlp", "linear"], dropout: float, num_classes: int
) -> nn.Module:
    """Build the classifier after *pooling*: three layers for "mlp", the pooling's own for "linear"."""
    if kind == "linear":
        return pooling.classifier(num_classes)
    return nn.Sequential(
        nn.Linear(pooling.out_features, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, num_classes),
    )
