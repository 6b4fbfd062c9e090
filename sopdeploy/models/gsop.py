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
from sopdeploy.blocks.attended import AttentionAfter, AttentionInside
from sopdeploy.blocks.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.pooling.base import GlobalPooling
from sopdeploy.pooling.isqrt_pooling import ISqrtPoolingConfig

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

    def plain(self) -> Backbone:
        """Return another one: all of it ships."""
        return type(self)(self.config, self.num_classes)

    def representation(self) -> int:
        """Return the channels of the last map, or the length of the triangle."""
        return self.pooling.out_features
