"""First-order networks: baselines, and the networks that remain after detaching."""

from sopdeploy.backbones.alexnet_vgg import VGG, AlexNet, AlexNetConfig, VGGConfig
from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.backbones.efficientnet import (
    EfficientNet,
    EfficientNetConfig,
    EfficientNetLite,
    EfficientNetLiteConfig,
)
from sopdeploy.backbones.resnet import DilatedResNet, DilatedResNetConfig, ResNet, ResNetConfig
from sopdeploy.layers.pooling.base import FlattenConfig
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
}
