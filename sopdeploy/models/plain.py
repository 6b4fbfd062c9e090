"""First-order networks: baselines, and what a detached network must equal."""

from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.backbones.efficientnet import EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.config import StrictModel
from sopdeploy.models.base import Classifier, Entry


class PlainResNet(Classifier, ResNet):
    """ResNet-18/34/50/101 for 224-pixel images."""

    inference_class = ResNet


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


PREACT_NETWORKS: dict[str, tuple[dict[str, int | str], str]] = {
    "preact-resnet110": ({"blocks": 18, "block": "basic"}, "pre-activation ResNet-110"),
    "preact-resnet164": ({"blocks": 18, "block": "bottleneck"}, "pre-activation ResNet-164"),
    "wrn-22-10": ({"blocks": 3, "block": "basic", "widen": 10}, "WRN-22-10"),
    "wrn-28-10": ({"blocks": 4, "block": "basic", "widen": 10}, "WRN-28-10"),
}


def imagenet_entry(
    network: type[Classifier], config: type[StrictModel], summary: str, **defaults: object
) -> Entry:
    """Build the entry of a network for 224-pixel images and 1000 classes."""
    return Entry(
        network=network, config=config, defaults=defaults, image_size=224, num_classes=1000, summary=summary
    )


def cifar_entry(
    network: type[Classifier], config: type[StrictModel], summary: str, **defaults: object
) -> Entry:
    """Build the entry of a network for 32-pixel images and 10 classes."""
    summary = f"{summary} for 32-pixel images"
    return Entry(
        network=network, config=config, defaults=defaults, image_size=32, num_classes=10, summary=summary
    )


ENTRIES = {
    **{
        f"resnet{depth}": imagenet_entry(PlainResNet, ResNetConfig, f"plain ResNet-{depth}", depth=depth)
        for depth in (18, 34, 50, 101)
    },
    "efficientnet-b0": imagenet_entry(PlainEfficientNet, EfficientNetConfig, "plain EfficientNet-b0"),
    **{
        f"resnet{depth}": cifar_entry(
            PlainSmallResNet, SmallResNetConfig, f"plain ResNet-{depth}", depth=depth
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        name: cifar_entry(PlainPreActResNet, PreActResNetConfig, f"plain {title}", **defaults)
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"resnext29-{groups}x64d": cifar_entry(
            PlainResNeXt, ResNeXtConfig, f"plain ResNeXt-29 {groups}x64d", cardinality=groups
        )
        for groups in (8, 16)
    },
}
