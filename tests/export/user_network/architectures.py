"""Published architectures with and without training-only parts: small versions, and the sizes of ImageNet."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import Bottleneck, ResNet

CLASSES = 4


def mix(channels: int, out: int) -> nn.Module:
    """Build one grouped 1x1 convolution in place of an inception block."""
    return nn.Conv2d(channels, out, 1, groups=math.gcd(channels, out))


class Head(nn.Module):
    """A linear layer on average features in place of an auxiliary classifier."""

    def __init__(self, channels: int, classes: int, **_: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


def to(out: int) -> Callable[..., nn.Module]:
    return lambda channels, **_: mix(channels, out)


INCEPTION = [
    nn.Conv2d, lambda channels, pool_features: mix(channels, 224 + pool_features), to(768), to(768),
    to(1280), to(2048), Head,
]  # fmt: skip


class TwoBranches(ResNet):
    """A ResNet with auxiliary classifiers after its second and third stage."""

    def __init__(self, block: Any, layers: list[int], *, branches: bool = True) -> None:
        super().__init__(block, layers, num_classes=CLASSES)
        self.branch2 = Head(128 * block.expansion, CLASSES) if branches else None
        self.branch3 = Head(256 * block.expansion, CLASSES) if branches else None

    def forward(self, images: Tensor) -> Any:
        early = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images))))))
        middle = self.layer3(early)
        logits = self.fc(self.avgpool(self.layer4(middle)).flatten(1))
        if self.training and self.branch2 is not None and self.branch3 is not None:
            return logits, self.branch2(early), self.branch3(middle)
        return logits


class Case(NamedTuple):
    """Builders of a trained and of a plain network, the parts to detach, and the side of images."""

    trained: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    training_only: tuple[str, ...]
    side: int


def whole(build: Callable[[], nn.Module], side: int = 32) -> Case:
    return Case(build, build, (), side)


def auxiliary(kind: Callable[..., nn.Module], pattern: str, side: int, **options: Any) -> Case:
    build = partial(kind, num_classes=CLASSES, init_weights=False, **options)
    return Case(partial(build, aux_logits=True), partial(build, aux_logits=False), (pattern,), side)


def two_branches(block: Any, layers: list[int], side: int) -> Case:
    build = partial(TwoBranches, block, layers)
    return Case(build, partial(build, branches=False), ("branch*",), side)


SMALL = {
    "Inception v3": auxiliary(models.Inception3, "AuxLogits", 32, inception_blocks=INCEPTION),
    "EfficientNet": whole(
        lambda: EfficientNet([MBConvConfig(4, 3, 2, 8, 8, 1)], 0.2, num_classes=CLASSES, last_channel=8)
    ),
    "Swin": whole(lambda: models.SwinTransformer([4, 4], 4, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)),
}


def of_timm(name: str) -> Case:
    return whole(partial(timm.create_model, name, num_classes=CLASSES), 224)


def of_torchvision(name: str) -> Case:
    return whole(partial(models.get_model, name, weights=None, num_classes=CLASSES), 224)


FULL = {
    "GoogLeNet": auxiliary(models.GoogLeNet, "aux*", 224),
    "Inception v3": auxiliary(models.Inception3, "AuxLogits", 299),
    "ResNet-50 with two branches": two_branches(Bottleneck, [3, 4, 6, 3], 224),
    "ConvNeXt": of_torchvision("convnext_tiny"),
    "MobileNetV3": of_torchvision("mobilenet_v3_small"),
    "EfficientNet": of_torchvision("efficientnet_b0"),
    "ViT": of_torchvision("vit_b_32"),
    "Swin": of_torchvision("swin_t"),
    "LeViT": of_timm("levit_128s"),
    "distilled DeiT": of_timm("deit_tiny_distilled_patch16_224"),
}
