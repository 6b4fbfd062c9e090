"""GSoP-Net: second-order blocks inside the network, scaling its maps; GSoP-Net2 pools by covariance too.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019).
GSoP-Net1 ends in global average pooling, GSoP-Net2 in dimension reduction and iSQRT-COV instead of the
last block.

Where paper and released code differ the paper is the default, and `RELEASED` holds the code's
values: the paper puts the block after the last bottleneck of a stage, with a shortcut around it
(sections 3.4 and 4.1), the code on that bottleneck's residual before the addition; the code's DR has
stride 2 in conv2_x, on which the GFLOPs of Tables 5 and 6 rest; Newton-Schulz runs 5 steps in the
paper, 3 in the code. What differs inside the block is told in `blocks/gsop_block.py`. Nothing of the
network is for training only, so nothing leaves when it ships.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise
from sopdeploy.backbones.cifar_resnet import STAGES as PREACT_STAGES
from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.backbones.resnet import BLOCKS, STAGES, ResNet, ResNetConfig
from sopdeploy.errors import ConfigError
from sopdeploy.layers.attention.first_order import (
    AttentionAfter,
    AttentionInside,
    BottleneckAttendedAfter,
    BottleneckAttendedInside,
    PreActBottleneckAttendedAfter,
    PreActBottleneckAttendedInside,
)
from sopdeploy.layers.attention.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig
from sopdeploy.layers.pooling.base import GapConfig, GlobalPooling
from sopdeploy.layers.pooling.isqrt import ISqrtPoolingConfig
from sopdeploy.models.base import Classifier, Entry

Stage = Literal["layer1", "layer2", "layer3", "layer4"]  # conv2_x .. conv5_x
Place = Literal["after", "inside"]


class GSoPConfig(GSoPBlockConfig):
    """The blocks, where they are, and the end of the network.

    `final_pooling` is "gap" (GSoP-Net1) or "isqrt" (GSoP-Net2, with `final_width` channels after DR, N
    `iterations` and `dropout` on the vector). `block_stages` are the stages with blocks; `None` means
    the paper's: all for GSoP-Net1, all but the end of the last for GSoP-Net2. `block_place` and
    `strided_dr_stages` (stages whose channel-wise DR strides by 2) are where the code leaves the paper.
    """

    final_pooling: Literal["gap", "isqrt"] = "gap"
    final_width: Annotated[int, pydantic.Field(ge=1)] = 256
    iterations: Annotated[int, pydantic.Field(ge=1, le=15)] = 5
    prenorm: Literal["trace", "frobenius"] = "trace"
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    block_stages: tuple[Stage, ...] | None = None
    block_place: Place = "after"
    strided_dr_stages: tuple[Stage, ...] = ()


RELEASED: dict[str, Any] = {
    **RELEASED_BLOCK,
    "block_place": "inside",
    "strided_dr_stages": ("layer1",),
    "iterations": 3,
}


class GSoP(Classifier):
    """A network with GSoP blocks; to be mixed in before a backbone.

    The backbone's parts keep their names; a block is the part `attention` of the residual block it
    belongs to, GSoP-Net2 has its own `pooling` and `fc`.
    """

    config: GSoPConfig
    pooling: GlobalPooling
    fc: nn.Module

    @abstractmethod
    def attended_block(self, channels: int) -> AttentionAfter | AttentionInside:
        """Return a residual block of the backbone's kind that takes an attention where the config says."""

    def attach(self, places: Mapping[str, tuple[int, ...]]) -> None:
        """Put blocks at these positions of the stages, and the second-order end where it is asked for."""
        wanted: set[str] = {*(self.config.block_stages or ()), *self.config.strided_dr_stages}
        for name in sorted(wanted - set(places)):
            raise ConfigError(f"block_stages, strided_dr_stages: no {name}; stages are {', '.join(places)}")
        for name, positions in self.paper_places(places).items():
            stage = self.get_submodule(name)
            dr_stride = 2 if name in self.config.strided_dr_stages else 1
            for position in positions:
                channels = self.tap_channels[f"{name}.{position}"]
                block = self.attended_block(channels)
                block.attention = GSoPBlock(self.config, channels, dr_stride)
                stage.register_module(str(position), block)
                initialise(block)
        if self.config.final_pooling == "isqrt":
            self.attach_second_order_end()

    def paper_places(self, places: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the positions that the config keeps of all the *places*, stage by stage."""
        if self.config.block_stages is not None:
            return {name: places[name] for name in self.config.block_stages}
        kept = dict(places)
        if self.config.final_pooling == "isqrt":
            last = list(places)[-1]
            kept[last] = places[last][:-1]
        return kept

    def attach_second_order_end(self) -> None:
        """Replace global average pooling by DR, iSQRT-COV and a wider linear layer."""
        config = self.config
        isqrt = ISqrtPoolingConfig(
            width=config.final_width, iterations=config.iterations, prenorm=config.prenorm
        )
        self.pooling = isqrt.build(self.pooling.out_features)
        initialise(self.pooling)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = self.pooling.classifier(self.num_classes)

    def second_order_logits(self, features: Tensor) -> Tensor:
        """Return logits of the root of the features' covariance: how GSoP-Net2 classifies."""
        logits: Tensor = self.fc(self.dropout(self.pooling(features)))
        return logits

    def inference_model(self) -> Backbone:
        """Return another one: all of it ships."""
        return type(self)(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return the channels of the last map, or the length of the triangle."""
        return self.pooling.out_features


BLOCK_SPACING = 3  # 18 bottlenecks a stage, 6 of them with a block
FINAL_POOLING = {1: "gap", 2: "isqrt"}  # of GSoP-Net1 and GSoP-Net2


class GSoPResNetConfig(ResNetConfig, GSoPConfig):
    """ResNet of bottlenecks for 224-pixel images; conv5_x keeps its size, as in the paper."""

    depth: Literal[26, 50, 101] = 50
    conv5_stride: Literal[1, 2] = 1
    pooling: GapConfig = GapConfig()  # the end of this network is its own


class GSoPResNet(GSoP, ResNet):
    """GSoP-Net on ResNet-26/50/101: one block at the last bottleneck of a stage (section 4.1, Table 3)."""

    config: GSoPResNetConfig

    def __init__(self, config: GSoPResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach({stage: (n - 1,) for stage, n in zip(STAGES, BLOCKS[config.depth], strict=True)})

    def attended_block(self, channels: int) -> AttentionAfter | AttentionInside:
        """Return a bottleneck that keeps its input's shape."""
        inside = self.config.block_place == "inside"
        return (BottleneckAttendedInside if inside else BottleneckAttendedAfter)(channels, channels)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of averaged features, or of their covariance's root."""
        if self.config.final_pooling == "isqrt":
            return self.second_order_logits(features)
        return super().classify(features)


class GSoPPreActResNetConfig(PreActResNetConfig, GSoPConfig):
    """PreAct-ResNet of bottlenecks for 32-pixel images; covariances are narrower, conv4_x keeps its size."""

    blocks: Annotated[int, pydantic.Field(ge=2)] = 18  # the first of a stage changes the shape
    block: Literal["bottleneck"] = "bottleneck"
    last_stride: Literal[1, 2] = 1
    pooling: GapConfig = GapConfig()  # the end of this network is its own
    cov_width: Annotated[int, pydantic.Field(ge=32, le=256)] = 64
    final_width: Annotated[int, pydantic.Field(ge=1)] = 128
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5


class GSoPPreActResNet(GSoP, PreActResNet):
    """GSoP-Net on PreAct-ResNet-164: a block at every third bottleneck (section 4.3).

    In GSoP-Net2 iSQRT-COV takes the place of the last one. Stages of two bottlenecks, which the paper does
    not have, get one block at their last.
    """

    config: GSoPPreActResNetConfig

    def __init__(self, config: GSoPPreActResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        spacing = min(BLOCK_SPACING, config.blocks)
        self.attach(dict.fromkeys(PREACT_STAGES, tuple(range(spacing - 1, config.blocks, spacing))))

    def attended_block(self, channels: int) -> AttentionAfter | AttentionInside:
        """Return a pre-activation bottleneck that keeps its input's shape."""
        inside = self.config.block_place == "inside"
        return (PreActBottleneckAttendedInside if inside else PreActBottleneckAttendedAfter)(
            channels, channels
        )

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of averaged features, or of their covariance's root."""
        if self.config.final_pooling == "isqrt":
            return self.second_order_logits(features)
        return super().classify(features)


def gsop_resnet(net: int, depth: int) -> Entry:
    """Return the entry of GSoP-Net*net* on a ResNet."""
    defaults: dict[str, Any] = {"depth": depth, "final_pooling": FINAL_POOLING[net]}
    return Entry(
        network=GSoPResNet,
        config=GSoPResNetConfig,
        defaults=defaults,
        image_size=224,
        num_classes=1000,
        summary=f"GSoP-Net{net} on ResNet-{depth}: covariances scale the channels of every stage",
    )


def gsop_preact_resnet(net: int, depth: int) -> Entry:
    """Return the entry of GSoP-Net*net* on a pre-activation ResNet of (depth - 2) / 9 bottlenecks a stage."""
    defaults: dict[str, Any] = {"blocks": (depth - 2) // 9, "final_pooling": FINAL_POOLING[net]}
    return Entry(
        network=GSoPPreActResNet,
        config=GSoPPreActResNetConfig,
        defaults=defaults,
        image_size=32,
        num_classes=100,
        summary=f"GSoP-Net{net} on PreAct-ResNet-{depth} for 32-pixel images",
    )


ENTRIES = {
    **{
        f"gsop-net{net}-resnet{depth}": gsop_resnet(net, depth)
        for net in FINAL_POOLING
        for depth in (26, 50, 101)
    },
    **{
        f"gsop-net{net}-preact-resnet{depth}": gsop_preact_resnet(net, depth)
        for net in FINAL_POOLING
        for depth in (29, 164)
    },
}
