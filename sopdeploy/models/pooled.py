"""Networks whose global pooling ships with them: iSQRT-COV, MPN-COV and their rivals.

Papers: iSQRT-COV and MPN-COV, as in fast-MPN-COV (ResNets with conv5_x at stride 1; VGG-D). Any other
pooling goes onto any backbone by the switch `pooling`, such as `create_model("resnet50", pooling="cbp")`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise
from sopdeploy.backbones.cifar_resnet import SmallResNetConfig
from sopdeploy.backbones.efficientnet import EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.backbones.vgg import VGG, VGGConfig
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mbconv import swish_reduction
from sopdeploy.layers.newton_schulz import RootOptions
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.plain import PlainResNet, PlainSmallResNet


class PooledVGG(Classifier, VGG):
    """VGG-16 with batch norm and a global pooling."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return VGG(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives."""
        return self.pooling.out_features


def pooled_resnet(depth: int, pooling: str, summary: str) -> Entry:
    """Return the entry of a ResNet whose conv5_x keeps its size, before *pooling*."""
    return Entry(
        network=PlainResNet,
        config=ResNetConfig,
        defaults={"depth": depth, "conv5_stride": 1, "pooling": pooling},
        image_size=224,
        num_classes=1000,
        summary=f"{summary} on ResNet-{depth}",
    )


def pooled_small_resnet(depth: int, pooling: str, summary: str) -> Entry:
    """Return the entry of a ResNet for 32-pixel images before *pooling*."""
    return Entry(
        network=PlainSmallResNet,
        config=SmallResNetConfig,
        defaults={"depth": depth, "pooling": pooling},
        image_size=32,
        num_classes=10,
        summary=f"{summary} on ResNet-{depth} for 32-pixel images",
    )


def pooled_vgg(pooling: str | Mapping[str, Any], classifier: str, summary: str) -> Entry:
    """Return the entry of VGG-16 before *pooling*."""
    return Entry(
        network=PooledVGG,
        config=VGGConfig,
        defaults={"pooling": pooling, "classifier": classifier},
        image_size=224,
        num_classes=1000,
        summary=f"{summary} on VGG-16",
    )


ISQRT = "iSQRT-COV (iterated square root of the covariance)"
MPNCOV = "MPN-COV (square root by eigenvalues; cannot be exported)"


class SecondOrderEfficientNetConfig(EfficientNetConfig, RootOptions):
    """EfficientNet-b0, and the covariance's `width` and iteration."""

    pooling: GapConfig = GapConfig()  # the end of this network is its own
    width: Annotated[int, pydantic.Field(ge=1)] = 64


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 whose global average is replaced by DR and the root of the covariance."""

    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = swish_reduction(self.pooling.out_features, config.width)
        self.root = ISqrtCov(config.width, config.newton_schulz())
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialise(self.reduction)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of second-order pooled features."""
        pooled = self.root(self.reduction(features))
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

    def inference_model(self) -> Backbone:
        """Return another one."""
        return SecondOrderEfficientNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return the length of the triangle."""
        return self.root.out_features


ENTRIES = {
    **{f"isqrt-resnet{depth}": pooled_resnet(depth, "isqrt", ISQRT) for depth in (18, 34, 50, 101)},
    **{
        f"isqrt-resnet{depth}": pooled_small_resnet(depth, "isqrt", ISQRT)
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{f"mpncov-resnet{depth}": pooled_resnet(depth, "mpncov", MPNCOV) for depth in (18, 50, 101)},
    "isqrt-vgg16": pooled_vgg("isqrt", "mlp", ISQRT),
    "mpncov-vgg16": pooled_vgg("mpncov", "mlp", MPNCOV),
    "bcnn-vgg16": pooled_vgg("bcnn", "linear", "B-CNN (bilinear pooling)"),
    "cbp-vgg16": pooled_vgg("cbp", "linear", "compact bilinear pooling"),
    "netvlad-vgg16": pooled_vgg("netvlad", "linear", "NetVLAD"),
    "isqrt-efficientnet-b0": Entry(
        network=SecondOrderEfficientNet,
        config=SecondOrderEfficientNetConfig,
        defaults={},
        image_size=224,
        num_classes=1000,
        summary="EfficientNet-b0 with iSQRT-COV in place of its global average",
    ),
}
