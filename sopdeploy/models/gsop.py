"""GSoP-Net: second-order blocks inside the network, scaling its maps; GSoP-Net2 pools by covariance too.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019). GSoP-Net1
ends in average pooling; GSoP-Net2 has dimension reduction and iSQRT-COV instead of the last
block.

Where paper and released code differ the paper is the default, and `RELEASED` holds the code's
values: the paper puts the block after the last bottleneck of a stage, with a shortcut around it
(sections 3.4 and 4.2), the code on that bottleneck's residual before the addition; the code's
DR has stride 2 in conv2_x, and the GFLOPs of Tables 5 and 6 are those with this stride;
Newton-Schulz runs 5 steps in the paper, 3 in the code. Differences inside the block are
documented in `layers/gsop_block.py`. The network has no training-only parts.
"""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.base.config import Count, FractionBelowOne
from sopdeploy.errors import ConfigError
from sopdeploy.layers.gsop_block import GSoPBlock, GSoPBlockConfig
from sopdeploy.layers.isqrt_cov import NewtonSchulzOptions
from sopdeploy.layers.pooling.base import FixedAverage, GapConfig, GlobalPooling
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.models.backbones.base import initialize
from sopdeploy.models.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.models.backbones.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from sopdeploy.models.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import GSOP_RELEASED

Stage = Literal["layer1", "layer2", "layer3", "layer4"]  # conv2_x .. conv5_x
RELEASED = GSOP_RELEASED


class GSoPConfig(GSoPBlockConfig, NewtonSchulzOptions):
    """Options of the GSoP blocks, of their positions in the network, and of the final pooling.

    `final_pooling` is "gap" (GSoP-Net1) or "isqrt" (GSoP-Net2, with `final_width` channels
    after DR, N `iterations` and `dropout` on the vector). `block_stages` are the stages with
    blocks; `None` selects the paper's: all for GSoP-Net1; for GSoP-Net2 all, but without the
    last block. The released code differs from the paper in `block_place` and
    `strided_dr_stages`, the stages whose channel-wise DR has stride 2.
    """

    final_pooling: Literal["gap", "isqrt"] = "gap"
    final_width: Count = 256
    dropout: FractionBelowOne = 0.0
    block_stages: tuple[Stage, ...] | None = None
    block_place: Literal["after", "inside"] = "after"
    strided_dr_stages: tuple[Stage, ...] = ()


class GSoP(Classifier):
    """Mixin that adds GSoP blocks to a backbone; put it before the backbone in the bases.

    The backbone's modules keep their names. A GSoP block is the child `attention` of the
    residual block that it belongs to. GSoP-Net2 has its own `pooling` and `fc`.

    Attributes:
        block_spacing: A GSoP block follows every n-th residual block of a stage; `None`: only the last one.
    """

    block_spacing: ClassVar[int | None] = None
    config: GSoPConfig
    pooling: GlobalPooling

    def __init__(self, config: GSoPConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)

        # A GSoP block in each attended residual block.
        for tap in self.attended_taps():  # the names of residual blocks, such as `layer1.2`
            stage, _, index = tap.partition(".")
            channels = self.tap_channels[tap]
            # Blocks that are not the first of a stage are built a second time, so that a seed
            # gives the weights of earlier versions.
            if index != "0":
                self.set_submodule(tap, self.branch_block(channels, channels, 1))
            block: Any = self.get_submodule(tap)

            dr_stride = 2 if stage in config.strided_dr_stages else 1
            block.attention = GSoPBlock(config, channels, dr_stride)
            block.attention_after = config.block_place == "after"
            initialize(block)

        if config.final_pooling == "isqrt":  # GSoP-Net2 replaces pooling and classifier
            isqrt = ISqrtPoolingConfig(
                width=config.final_width, iterations=config.iterations, prenorm=config.prenorm
            )
            self.pooling = isqrt.build(self.pooling.out_features)
            initialize(self.pooling)
            self.dropout = nn.Dropout(config.dropout)
            self.fc = nn.Linear(self.pooling.out_features, num_classes)
            self.classifier_parts = ("pooling", "dropout", "fc")

    def attended_taps(self) -> list[str]:
        """List the residual blocks that have a GSoP block; raise `ConfigError` for an unknown stage."""
        config = self.config

        unknown = sorted(
            {*(config.block_stages or ()), *config.strided_dr_stages} - {*self.stage_names}
        )
        if unknown:
            raise ConfigError(
                f"block_stages, strided_dr_stages: no {unknown[0]}; stages are "
                f"{', '.join(self.stage_names)}"
            )

        # Every few blocks of a stage, counted from its end.
        taps: list[str] = []
        for stage in self.stage_names if config.block_stages is None else config.block_stages:
            length = len(list(self.get_submodule(stage).children()))
            # The spacing is at most `length`, so each stage has a block.
            spacing = min(self.block_spacing or length, length)
            taps += [f"{stage}.{index}" for index in range(spacing - 1, length, spacing)]

        if config.block_stages is None and config.final_pooling == "isqrt":
            del taps[-1]  # the final pooling of the paper's GSoP-Net2 replaces the last block
        return taps


class GSoPResNetConfig(ResNetConfig, GSoPConfig):
    """ResNet for 224-pixel images; conv5_x keeps its size, as in the paper, which uses bottlenecks."""

    depth: Literal[18, 26, 34, 50, 101] = 50
    conv5_stride: Literal[1, 2] = 1
    pooling: FixedAverage = GapConfig()  # fixed: `final_pooling` selects the pooling


class GSoPResNet(GSoP, ResNet):
    """GSoP-Net on a ResNet: one block at the last residual block of a stage (section 4.2)."""

    config: GSoPResNetConfig


class GSoPPreActResNetConfig(PreActResNetConfig, GSoPConfig):
    """PreAct-ResNet of bottlenecks for 32-pixel images; covariances are narrower, conv4_x keeps its size."""

    block: Literal["bottleneck"] = "bottleneck"
    last_stride: Literal[1, 2] = 1
    pooling: FixedAverage = GapConfig()  # fixed: `final_pooling` selects the pooling
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 64
    final_width: Count = 128
    dropout: FractionBelowOne = 0.5


class GSoPPreActResNet(GSoP, PreActResNet):
    """GSoP-Net on PreAct-ResNet-164: a block at every third bottleneck (section 4.3).

    In GSoP-Net2 iSQRT-COV replaces the last block. A stage of one or two bottlenecks, which the
    paper does not have, has one block at its last bottleneck.
    """

    block_spacing = 3  # 18 bottlenecks per stage, 6 of them with a block
    config: GSoPPreActResNetConfig


class GSoPEfficientNetLiteConfig(EfficientNetLiteConfig, GSoPBlockConfig):
    """EfficientNet-Lite with GSoP blocks; `pooling` "gap" is GSoP-Net1, "isqrt" is GSoP-Net2.

    `block_stages` are the stages with blocks. `None` selects those whose map is tapped: all for GSoP-Net1;
    GSoP-Net2 pools by covariance instead of its last block. A block and its shortcut multiply a channel by
    1 + sigmoid(z); `gate_bias` is the first bias of z. With 0, pretrained layers read maps that are 1.5
    times as large, with -2 1.12 times, and with -4 1.02 times. The gradient of the block is proportional to
    the derivative of the sigmoid: 0.25, 0.10 and 0.02.
    """

    block_stages: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    gate_bias: float = 0.0


class GSoPEfficientNetLite(Classifier, EfficientNetLite):
    """GSoP-Net on EfficientNet-Lite, to fine-tune from its ImageNet weights; the paper does not have it.

    A GSoP block and a shortcut around it follow the last block of a stage, as on ResNet. A covariance
    has at most as many channels as the map.
    """

    config: GSoPEfficientNetLiteConfig

    def __init__(self, config: GSoPEfficientNetLiteConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)

        # The stages with a GSoP block: by default, those whose last block is tapped.
        tapped = {tap.rpartition(".")[0]: count for tap, count in self.tap_channels.items()}
        stages = config.block_stages
        if stages is None:
            stages = tuple(tapped) if config.pooling.kind == "gap" else tuple(tapped)[:-1]
        unknown = sorted({*stages} - tapped.keys())
        if unknown:
            raise ConfigError(f"block_stages: no {unknown[0]}; stages are {', '.join(tapped)}")

        # The block is a child of the stage, so that weight files of the backbone fit.
        for stage in stages:
            channels = tapped[stage]
            narrow = config.model_copy(update={"cov_width": min(config.cov_width, channels)})
            attention = ShortcutAround(GSoPBlock(narrow, channels, 1))
            initialize(attention)
            for name, parameter in attention.named_parameters():
                if name.endswith("excitation.conv.bias"):
                    nn.init.constant_(parameter, config.gate_bias)
            self.get_submodule(stage).add_module("attention", attention)


class ShortcutAround(nn.Module):
    """Add the input of *block* to its output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Compute x + block(x)."""
        return x + self.block(x)
