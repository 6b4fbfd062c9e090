"""Networks that are exported with their second-order pooling: iSQRT-COV, MPN-COV and alternatives.

Papers: iSQRT-COV and MPN-COV, as in fast-MPN-COV (ResNets with conv5_x at stride 1; VGG-D). Any other
pooling is set on any backbone by the option `pooling`, such as `create_model("resnet50", pooling="cbp")`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import SmallResNetConfig
from sopdeploy.backbones.efficientnet import EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.backbones.vgg import VGG, VGGConfig
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mbconv import swish_reduction
from sopdeploy.layers.newton_schulz import NewtonSchulzOptions
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.plain import PlainResNet, PlainSmallResNet, cifar_entry, imagenet_entry

ISQRT = "iSQRT-COV (iterated square root of the covariance)"
MPNCOV = "MPN-COV (square root by eigenvalues; cannot be exported)"


class PooledVGG(Classifier, VGG):
    """VGG-16 with batch norm and a global pooling."""

    inference_class = VGG


class SecondOrderEfficientNetConfig(EfficientNetConfig, NewtonSchulzOptions):
    """EfficientNet-b0, and the `width` of the covariance."""

    pooling: GapConfig = GapConfig()  # fixed: this network has its own second-order pooling
    width: Annotated[int, pydantic.Field(ge=1)] = 64


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 with DR and the root of the covariance instead of its global average."""

    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = swish_reduction(self.pooling.out_features, config.width)
        self.root = ISqrtCov(config.width, config.newton_schulz())
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialize(self.reduction)

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits of second-order pooled features."""
        pooled = self.root(self.reduction(features))
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

    def num_features(self) -> int:
        """Return the length of the triangle."""
        return self.root.out_features


def _resnet(depth: int, pooling: str, summary: str) -> Entry:
    """Build the entry of a ResNet whose conv5_x has stride 1, with *pooling*."""
    title = f"{summary} on ResNet-{depth}"
    return imagenet_entry(PlainResNet, ResNetConfig, title, depth=depth, conv5_stride=1, pooling=pooling)


def _vgg(pooling: str | Mapping[str, Any], classifier: str, summary: str) -> Entry:
    """Build the entry of VGG-16 with *pooling*."""
    return imagenet_entry(
        PooledVGG, VGGConfig, f"{summary} on VGG-16", pooling=pooling, classifier=classifier
    )


ENTRIES = {
    **{f"isqrt-resnet{depth}": _resnet(depth, "isqrt", ISQRT) for depth in (18, 34, 50, 101)},
    **{
        f"isqrt-resnet{depth}": cifar_entry(
            PlainSmallResNet, SmallResNetConfig, f"{ISQRT} on ResNet-{depth}", depth=depth, pooling="isqrt"
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{f"mpncov-resnet{depth}": _resnet(depth, "mpncov", MPNCOV) for depth in (18, 50, 101)},
    "isqrt-vgg16": _vgg("isqrt", "mlp", ISQRT),
    "mpncov-vgg16": _vgg("mpncov", "mlp", MPNCOV),
    "bcnn-vgg16": _vgg("bcnn", "linear", "B-CNN (bilinear pooling)"),
    "cbp-vgg16": _vgg("cbp", "linear", "compact bilinear pooling"),
    "netvlad-vgg16": _vgg("netvlad", "linear", "NetVLAD"),
    "isqrt-efficientnet-b0": imagenet_entry(
        SecondOrderEfficientNet,
        SecondOrderEfficientNetConfig,
        "EfficientNet-b0 with iSQRT-COV in place of its global average",
    ),
}
