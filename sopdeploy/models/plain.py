"""The plain first-order networks: baselines, and what a detached network must equal."""

from sopdeploy.backbones.base import Backbone
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

    def inference_model(self) -> Backbone:
        """Return another one."""
        return ResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of conv5_x by default."""
        return self.pooling.out_features


class PlainSmallResNet(Classifier, SmallResNet):
    """ResNet-20/32/44/56/110 for 32-pixel images."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return SmallResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last stage by default."""
        return self.pooling.out_features


class PlainPreActResNet(Classifier, PreActResNet):
    """Pre-activation ResNet-110/164 and WRN for 32-pixel images."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return PreActResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


class PlainResNeXt(Classifier, ResNeXt):
    """ResNeXt-29 for 32-pixel images."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return ResNeXt(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


class PlainEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 for 224-pixel images."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return EfficientNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features


PREACT_NETWORKS: dict[str, tuple[dict[str, int | str], str]] = {
    "preact-resnet110": ({"blocks": 18, "block": "basic"}, "pre-activation ResNet-110"),
    "preact-resnet164": ({"blocks": 18, "block": "bottleneck"}, "pre-activation ResNet-164"),
    "wrn-22-10": ({"blocks": 3, "block": "basic", "widen": 10}, "WRN-22-10"),
    "wrn-28-10": ({"blocks": 4, "block": "basic", "widen": 10}, "WRN-28-10"),
}


def resnet(depth: int) -> Entry:
    """Return the entry of a ResNet for 224-pixel images."""
    return Entry(
        network=PlainResNet,
        config=ResNetConfig,
        defaults={"depth": depth},
        image_size=224,
        num_classes=1000,
        summary=f"plain ResNet-{depth}",
    )


def small(
    network: type[Classifier], config: type[StrictModel], defaults: dict[str, int | str], title: str
) -> Entry:
    """Return the entry of a network for 32-pixel images."""
    return Entry(
        network=network,
        config=config,
        defaults=defaults,
        image_size=32,
        num_classes=10,
        summary=f"plain {title} for 32-pixel images",
    )


EFFICIENTNET_B0 = Entry(
    network=PlainEfficientNet,
    config=EfficientNetConfig,
    defaults={},
    image_size=224,
    num_classes=1000,
    summary="plain EfficientNet-b0",
)
ENTRIES = {
    **{f"resnet{depth}": resnet(depth) for depth in (18, 34, 50, 101)},
    "efficientnet-b0": EFFICIENTNET_B0,
    **{
        f"resnet{depth}": small(PlainSmallResNet, SmallResNetConfig, {"depth": depth}, f"ResNet-{depth}")
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        name: small(PlainPreActResNet, PreActResNetConfig, defaults, title)
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"resnext29-{groups}x64d": small(
            PlainResNeXt, ResNeXtConfig, {"cardinality": groups}, f"ResNeXt-29 {groups}x64d"
        )
        for groups in (8, 16)
    },
}
