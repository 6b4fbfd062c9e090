"""First-order attention in every residual block: SE, CBAM and Gather-Excite, GSoP's baselines.

Papers: see `blocks/squeeze_excite.py`, `blocks/cbam.py` and `blocks/gather_excite.py`; GSoP compares itself
with them in its Tables 5 and 6. The attention scales each block's residual before the addition.
"""

from abc import abstractmethod
from typing import Annotated, NamedTuple

import pydantic
from torch import nn

from sopdeploy.backbones.base import Backbone, initialise
from sopdeploy.blocks.cbam import CBAM
from sopdeploy.blocks.gather_excite import Extent, GatherExcite, Parameters
from sopdeploy.blocks.squeeze_excite import SqueezeExcite
from sopdeploy.frozen import Frozen
from sopdeploy.models.base import Classifier
from sopdeploy.pooling.base import GlobalPooling

Reduction = Annotated[int, pydantic.Field(ge=1)]


class Map(NamedTuple):
    """The feature map that an attention scales: its channels, and what the image's side is divided by."""

    channels: int
    reduced_by: int


class AttentionConfig(Frozen):
    """What is in every block."""

    @abstractmethod
    def attention(self, features: Map) -> nn.Module:
        """Return a new attention module for these features."""


class SEConfig(AttentionConfig):
    """Squeeze-and-Excitation; `reduction` is r."""

    reduction: Reduction = 16

    def attention(self, features: Map) -> nn.Module:
        """Return a Squeeze-and-Excitation module."""
        return SqueezeExcite(features.channels, self.reduction)


class CBAMConfig(AttentionConfig):
    """CBAM; `reduction` is r, `kernel` the side of the convolution over positions."""

    reduction: Reduction = 16
    kernel: Annotated[int, pydantic.Field(ge=1, le=15)] = 7

    @pydantic.field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("kernel must be odd, so that the map keeps its size")
        return kernel

    def attention(self, features: Map) -> nn.Module:
        """Return a convolutional block attention module."""
        return CBAM(features.channels, self.reduction, self.kernel)


class GEConfig(AttentionConfig):
    """Gather-Excite: its extent, its parameters and, for "gather+excite", r.

    The default is the network of GSoP's Table 5 (1.3 times the parameters of ResNet-50). Global gathering
    with parameters binds the network to images of `side` pixels; nothing else reads it.
    """

    extent: Extent = "global"
    parameters: Parameters = "gather+excite"
    reduction: Reduction = 16
    side: Annotated[int, pydantic.Field(ge=32)] = 224

    def attention(self, features: Map) -> nn.Module:
        """Return a Gather-Excite module."""
        side = -(-self.side // features.reduced_by)
        return GatherExcite(features.channels, side, self.extent, self.parameters, self.reduction)


class Attended(Classifier):
    """A network with an attention module, `attention`, in every residual block.

    To be mixed in before a backbone whose `branch_block` returns blocks that take an attention.
    """

    config: AttentionConfig
    pooling: GlobalPooling

    def attach(self, reduced_by: dict[str, int]) -> None:
        """Put an attention into every block; *reduced_by* says how much smaller a stage's maps are."""
        for place, channels in self.tap_channels.items():
            stage = place.partition(".")[0]
            attention = self.config.attention(Map(channels, reduced_by[stage]))
            initialise(attention)
            self.get_submodule(place).add_module("attention", attention)

    def plain(self) -> Backbone:
        """Return another one: all of it ships."""
        return type(self)(self.config, self.num_classes)

    def representation(self) -> int:
        """Return what the global pooling gives: the channels of the last map by default."""
        return self.pooling.out_features
