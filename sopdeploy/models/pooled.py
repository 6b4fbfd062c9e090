"""iSQRT-COV on EfficientNet-b0 in place of its global average.

The option `pooling` sets any pooling on other backbones, such as `create_model("vgg16-bn",
pooling="isqrt")`, fast-MPN-COV's VGG-D, or `create_model("alexnet", pooling="bcnn")`, as in the
authors' slides on iSQRT-COV.
"""

from torch import nn

from sopdeploy.base.config import Count
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import FixedAverage, GapConfig, dimension_reduction
from sopdeploy.models.backbones.base import initialize
from sopdeploy.models.backbones.efficientnet import (
    HEAD_CHANNELS,
    EfficientNet,
    EfficientNetConfig,
)
from sopdeploy.models.base import Classifier


class SecondOrderEfficientNetConfig(EfficientNetConfig, NewtonSchulzOptions):
    """EfficientNet-b0, and the `width` of the covariance."""

    pooling: FixedAverage = GapConfig()  # fixed: this network has its own second-order pooling
    width: Count = 64


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 with DR and the root of the covariance instead of its global average."""

    classifier_parts = ("reduction", "root", "dropout", "classifier")
    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = dimension_reduction(HEAD_CHANNELS, config.width, nn.SiLU)
        self.root = ISqrtCov(config.width, config.root_config())
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialize(self.reduction)
