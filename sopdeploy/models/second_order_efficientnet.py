"""EfficientNet-b0 with a second-order head that ships: the rival of DSoP's branches on that network.

Paper: DSoP, section V-B: 1280 channels come down to 64 by a 1x1 convolution, batch norm and swish, then
iSQRT-COV, dropout of 0.2 and the linear classifier.
"""

from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise
from sopdeploy.backbones.efficientnet import EfficientNet, EfficientNetConfig
from sopdeploy.blocks.mbconv import swish_reduction
from sopdeploy.models.base import Classifier
from sopdeploy.models.entry import Entry
from sopdeploy.pooling.average import GapConfig
from sopdeploy.pooling.isqrt_cov import ISqrtCov, ISqrtCovConfig


class SecondOrderEfficientNetConfig(EfficientNetConfig):
    """EfficientNet-b0, and the covariance's `width` and iteration."""

    pooling: GapConfig = GapConfig()  # the end of this network is its own
    width: Annotated[int, pydantic.Field(ge=1)] = 64
    iterations: Annotated[int, pydantic.Field(ge=1, le=15)] = 5
    prenorm: Literal["trace", "frobenius"] = "trace"


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 whose global average is replaced by DR and the root of the covariance."""

    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = swish_reduction(self.pooling.out_features, config.width)
        self.root = ISqrtCov(
            ISqrtCovConfig(width=config.width, iterations=config.iterations, prenorm=config.prenorm)
        )
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialise(self.reduction)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of second-order pooled features."""
        pooled = self.root(self.reduction(features))
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

    def plain(self) -> Backbone:
        """Return another one."""
        return SecondOrderEfficientNet(self.config, self.num_classes)

    def representation(self) -> int:
        """Return the length of the triangle."""
        return self.root.out_features


ENTRIES = {
    "isqrt-efficientnet-b0": Entry(
        network=SecondOrderEfficientNet,
        config=SecondOrderEfficientNetConfig,
        defaults={},
        image_size=224,
        num_classes=1000,
        summary="EfficientNet-b0 with iSQRT-COV in place of its global average",
    )
}
