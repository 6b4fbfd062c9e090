"""The plain first-order networks: baselines, and what a detached network must equal."""

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.backbones.small_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.models.base import Classifier
from sopdeploy.models.entry import Entry


class PlainResNet(Classifier, ResNet):
    """ResNet-18/34/50/101 for 224-pixel images."""

    def plain(self) -> Backbone:
        """Return another one."""
        return ResNet(self.config, self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of conv5_x by default."""
        return self.pooling.out_features


class PlainSmallResNet(Classifier, SmallResNet):
    """ResNet-20/32/44/56/110 for 32-pixel images."""

    def plain(self) -> Backbone:
        """Return another one."""
        return SmallResNet(self.config, self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of the last stage by default."""
        return self.pooling.out_features


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


def small_resnet(depth: int) -> Entry:
    """Return the entry of a ResNet for 32-pixel images."""
    return Entry(
        network=PlainSmallResNet,
        config=SmallResNetConfig,
        defaults={"depth": depth},
        image_size=32,
        num_classes=10,
        summary=f"plain ResNet-{depth} for 32-pixel images",
    )


ENTRIES = {
    **{f"resnet{depth}": resnet(depth) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}": small_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
}
