"""Networks of a backbone, a global pooling and a classifier: first-order networks, iSQRT-COV and MPN-COV.

First-order networks are baselines, and those that remain after detaching. Papers of the others: iSQRT-COV and
MPN-COV, as in fast-MPN-COV (ResNets with conv5_x at stride 1). The option `pooling` sets any pooling on any
backbone, such as `create_model("vgg16-bn", pooling="isqrt")`, fast-MPN-COV's VGG-D, or
`create_model("alexnet", pooling="bcnn")`, as in the authors' slides on iSQRT-COV.
"""

from torch import nn

from sopdeploy.backbones.alexnet_vgg import VGG, AlexNet, AlexNetConfig, VGGConfig
from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.backbones.efficientnet import (
    HEAD_CHANNELS,
    EfficientNet,
    EfficientNetConfig,
    EfficientNetLite,
    EfficientNetLiteConfig,
)
from sopdeploy.backbones.resnet import DilatedResNet, DilatedResNetConfig, ResNet, ResNetConfig
from sopdeploy.config import Count
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import FlattenConfig, GapConfig
from sopdeploy.layers.residual import dimension_reduction
from sopdeploy.models.base import Classifier, Entry


def plain(backbone: type[Backbone]) -> type[Classifier]:
    """Build the class of the catalog's network that is *backbone* alone; it is exported as *backbone*."""
    parts = {"inference_class": backbone, "__doc__": backbone.__doc__}
    return type(f"Plain{backbone.__name__}", (Classifier, backbone), parts)


PlainResNet = plain(ResNet)
PlainAlexNet = plain(AlexNet)
PlainVGG = plain(VGG)
PlainSmallResNet = plain(SmallResNet)
PlainPreActResNet = plain(PreActResNet)
PlainResNeXt = plain(ResNeXt)
PlainEfficientNetLite = plain(EfficientNetLite)
PREACT_NETWORKS: dict[str, tuple[dict[str, int | str], str]] = {
    "preact-resnet110": ({"blocks": 18, "block": "basic"}, "pre-activation ResNet-110"),
    "preact-resnet164": ({"blocks": 18, "block": "bottleneck"}, "pre-activation ResNet-164"),
    "wrn-22-10": ({"blocks": 3, "block": "basic", "widen": 10}, "WRN-22-10"),
    "wrn-28-10": ({"blocks": 4, "block": "basic", "widen": 10}, "WRN-28-10"),
}
ISQRT = "iSQRT-COV (iterated square root of the covariance)"
MPNCOV = "MPN-COV (square root by eigenvalues; cannot be exported)"


class SecondOrderEfficientNetConfig(EfficientNetConfig, NewtonSchulzOptions):
    """EfficientNet-b0, and the `width` of the covariance."""

    pooling: GapConfig = GapConfig()  # fixed: this network has its own second-order pooling
    width: Count = 64


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 with DR and the root of the covariance instead of its global average."""

    classifier_parts = ("reduction", "root", "dropout", "classifier")
    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = dimension_reduction(HEAD_CHANNELS, config.width, nn.SiLU)
        self.root = ISqrtCov(config.width, config.newton_schulz())
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialize(self.reduction)


ENTRIES = {
    **{
        f"resnet{depth}": Entry(PlainResNet, ResNetConfig, {"depth": depth}, f"plain ResNet-{depth}")
        for depth in (18, 34, 50, 101)
    },
    "drn-a-50": Entry(
        plain(DilatedResNet), DilatedResNetConfig, {"depth": 50}, "DRN-A-50: dilated ResNet-50, stride 8"
    ),
    "alexnet": Entry(PlainAlexNet, AlexNetConfig, {}, "plain AlexNet"),
    **{
        name: Entry(PlainVGG, VGGConfig, {"pooling": FlattenConfig(), "batch_norm": norm}, f"plain {title}")
        for name, norm, title in (("vgg16", False, "VGG-16"), ("vgg16-bn", True, "VGG-16 with batch norm"))
    },
    "efficientnet-b0": Entry(plain(EfficientNet), EfficientNetConfig, {}, "plain EfficientNet-b0"),
    "efficientnet-lite0": Entry(
        PlainEfficientNetLite, EfficientNetLiteConfig, {}, "plain EfficientNet-Lite0"
    ),
    "efficientnet-lite2": Entry(
        PlainEfficientNetLite,
        EfficientNetLiteConfig,
        {"width": 1.1, "depth": 1.2, "dropout": 0.3},
        "plain EfficientNet-Lite2",
        260,
    ),
    **{
        f"resnet{depth}": Entry.at_32(
            PlainSmallResNet, SmallResNetConfig, {"depth": depth}, f"plain ResNet-{depth}"
        )
        for depth in (8, 20)
    },
    **{
        name: Entry.at_32(PlainPreActResNet, PreActResNetConfig, defaults, f"plain {title}")
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"resnext29-{n}x64d": Entry.at_32(
            PlainResNeXt, ResNeXtConfig, {"cardinality": n}, f"plain ResNeXt-29 {n}x64d"
        )
        for n in (8, 16)
    },
    **{
        f"{pooling}-resnet{depth}": Entry(
            PlainResNet,
            ResNetConfig,
            {"depth": depth, "conv5_stride": 1, "pooling": pooling},
            f"{title} on ResNet-{depth}",
        )
        for pooling, title, depths in (("isqrt", ISQRT, (50, 101)), ("mpncov", MPNCOV, (50,)))
        for depth in depths
    },
    "isqrt-efficientnet-b0": Entry(
        SecondOrderEfficientNet,
        SecondOrderEfficientNetConfig,
        {},
        "EfficientNet-b0 with iSQRT-COV in place of its global average",
    ),
}
