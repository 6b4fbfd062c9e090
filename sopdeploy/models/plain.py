"""First-order networks: baselines, and the networks that remain after detaching."""

from sopdeploy.backbones.alexnet import AlexNet, AlexNetConfig
from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.backbones.efficientnet import EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import DilatedResNet, DilatedResNetConfig, ResNet, ResNetConfig
from sopdeploy.backbones.vgg import VGG, VGGConfig
from sopdeploy.layers.pooling.base import FlattenConfig
from sopdeploy.models.base import Classifier, Entry


class PlainResNet(Classifier, ResNet):
    """ResNet-18/34/50/101 for 224-pixel images."""

    inference_class = ResNet


class PlainDilatedResNet(Classifier, DilatedResNet):
    """DRN-A on ResNet-18/34/50/101 (Table 5 of GSoP)."""

    inference_class = DilatedResNet


class PlainAlexNet(Classifier, AlexNet):
    """AlexNet for 224-pixel images, with any global pooling.

    Assumptions, because the slides do not show the layers: a second-order pooling replaces the last max
    pooling, and the classifier keeps its three layers, as in fast-MPN-COV's VGG-D.
    """

    inference_class = AlexNet


class PlainVGG(Classifier, VGG):
    """VGG-16 for 224-pixel images, with any global pooling."""

    inference_class = VGG


class PlainSmallResNet(Classifier, SmallResNet):
    """ResNet-20/32/44/56/110 for 32-pixel images."""

    inference_class = SmallResNet


class PlainPreActResNet(Classifier, PreActResNet):
    """Pre-activation ResNet-110/164 and WRN for 32-pixel images."""

    inference_class = PreActResNet


class PlainResNeXt(Classifier, ResNeXt):
    """ResNeXt-29 for 32-pixel images."""

    inference_class = ResNeXt


class PlainEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 for 224-pixel images."""

    inference_class = EfficientNet


AT_32 = "for 32-pixel images"
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
        PlainDilatedResNet, DilatedResNetConfig, {"depth": 50}, "DRN-A-50: dilated ResNet-50, stride 8"
    ),
    "alexnet": Entry(PlainAlexNet, AlexNetConfig, {}, "plain AlexNet"),
    **{
        name: Entry(PlainVGG, VGGConfig, {"pooling": FlattenConfig(), "batch_norm": norm}, f"plain {title}")
        for name, norm, title in (("vgg16", False, "VGG-16"), ("vgg16-bn", True, "VGG-16 with batch norm"))
    },
    "efficientnet-b0": Entry(PlainEfficientNet, EfficientNetConfig, {}, "plain EfficientNet-b0"),
    **{
        f"resnet{depth}": Entry(
            PlainSmallResNet, SmallResNetConfig, {"depth": depth}, f"plain ResNet-{depth} {AT_32}", 32, 10
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        name: Entry(PlainPreActResNet, PreActResNetConfig, defaults, f"plain {title} {AT_32}", 32, 10)
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"resnext29-{n}x64d": Entry(
            PlainResNeXt, ResNeXtConfig, {"cardinality": n}, f"plain ResNeXt-29 {n}x64d {AT_32}", 32, 10
        )
        for n in (8, 16)
    },
}
