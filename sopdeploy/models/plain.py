"""The plain first-order networks: baselines, and what a detached network must equal."""

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.resnet import ResNet
from sopdeploy.backbones.small_resnet import SmallResNet
from sopdeploy.models.base import Classifier


class PlainResNet(Classifier, ResNet):
    """ResNet-18/34/50/101 for 224-pixel images."""

    def plain(self) -> Backbone:
        """Return another one."""
        return ResNet(self.config, self.num_classes)

    def representation(self) -> int:
        """Return the channels of conv5_x."""
        return self.fc.in_features


class PlainSmallResNet(Classifier, SmallResNet):
    """ResNet-20/32/44/56/110 for 32-pixel images."""

    def plain(self) -> Backbone:
        """Return another one."""
        return SmallResNet(self.config, self.num_classes)

    def representation(self) -> int:
        """Return the channels of the last stage."""
        return self.fc.in_features
