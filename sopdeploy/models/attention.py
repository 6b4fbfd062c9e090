"""First-order attention in every residual block: SE, CBAM and Gather-Excite, GSoP's baselines.

Papers: see `layers/attention/first_order.py`; GSoP compares itself with them in its Tables 5 and 6. The
attention scales each block's residual before the addition.
"""

from typing import Annotated, Any, Literal

import pydantic
from torch import nn

from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.layers.attention.first_order import CBAM, GatherExcite, SqueezeExcite
from sopdeploy.models.base import Classifier, Entry

Reduction = Annotated[int, pydantic.Field(ge=1)]


class SEResNetConfig(ResNetConfig):
    """A ResNet with Squeeze-and-Excitation; its hidden layers have C / `reduction` channels."""

    reduction: Reduction = 16


class CBAMResNetConfig(ResNetConfig):
    """A ResNet with CBAM; `reduction` is r, `kernel` the side of the convolution over positions."""

    reduction: Reduction = 16
    kernel: Literal[3, 5, 7] = 7


class GEResNetConfig(ResNetConfig):
    """A ResNet with Gather-Excite: with parameters and global extent, as in GSoP's Table 5.

    `reduction` is r. The network accepts images of `side` pixels only.
    """

    extent: Literal["global"] = "global"
    parameters: Literal["gather+excite"] = "gather+excite"
    reduction: Reduction = 16
    side: Annotated[int, pydantic.Field(ge=32)] = 224


class SEPreActResNetConfig(PreActResNetConfig):
    """A pre-activation ResNet of bottlenecks for 32-pixel images with Squeeze-and-Excitation."""

    block: Literal["bottleneck"] = "bottleneck"
    reduction: Reduction = 16


AttendedConfig = SEResNetConfig | CBAMResNetConfig | GEResNetConfig | SEPreActResNetConfig


class Attended(Classifier):
    """Mixin that adds a module `attention` to every residual block of the backbone after it in the bases."""

    def __init__(self, config: "AttendedConfig", num_classes: int) -> None:
        super().__init__(config, num_classes)
        for tap, channels in self.tap_channels.items():
            attention: nn.Module
            match config:
                case SEResNetConfig() | SEPreActResNetConfig():
                    attention = SqueezeExcite(channels, config.reduction)
                case CBAMResNetConfig():
                    attention = CBAM(channels, config.reduction, config.kernel)
                case GEResNetConfig():
                    reduced_by = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16 * config.conv5_stride}
                    side = -(-config.side // reduced_by[tap.partition(".")[0]])
                    attention = GatherExcite(channels, side, config.reduction)
            initialize(attention)
            block: Any = self.get_submodule(tap)
            block.attention = attention


class AttendedResNet(Attended, ResNet):
    """ResNet-18/34/50/101 with an attention module in every block."""


class SEPreActResNet(Attended, PreActResNet):
    """PreAct-ResNet-164 with Squeeze-and-Excitation in every block (GSoP, Table 6)."""


CONFIGS: dict[str, tuple[type[ResNetConfig], str]] = {
    "se": (SEResNetConfig, "Squeeze-and-Excitation"),
    "cbam": (CBAMResNetConfig, "CBAM"),
    "ge": (GEResNetConfig, "Gather-Excite"),
}

ENTRIES = {
    **{
        f"{kind}-resnet{depth}": Entry(
            AttendedResNet, config, {"depth": depth}, f"ResNet-{depth} with {title} in every block"
        )
        for kind, (config, title) in CONFIGS.items()
        for depth in (18, 50, 101)
    },
    "se-preact-resnet164": Entry(
        SEPreActResNet,
        SEPreActResNetConfig,
        {},
        "PreAct-ResNet-164 for 32-pixel images with Squeeze-and-Excitation in every block",
        image_size=32,
        num_classes=100,
    ),
}
