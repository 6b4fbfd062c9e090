"""Networks whose global pooling ships with them: iSQRT-COV, MPN-COV and their rivals.

Papers: iSQRT-COV and MPN-COV, as in fast-MPN-COV (ResNets with conv5_x at stride 1; VGG-D). Any other
pooling goes onto any backbone by the switch `pooling`, such as `create_model("resnet50", pooling="cbp")`.
"""

from collections.abc import Mapping
from typing import Any

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.backbones.small_resnet import SmallResNetConfig
from sopdeploy.backbones.vgg import VGG, VGGConfig
from sopdeploy.models.base import Classifier
from sopdeploy.models.entry import Entry
from sopdeploy.models.plain import PlainResNet, PlainSmallResNet


class PooledVGG(Classifier, VGG):
    """VGG-16 with batch norm and a global pooling."""

    def plain(self) -> Backbone:
        """Return another one."""
        return VGG(self.config, self.num_classes)

    def representation(self) -> int:
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
}
