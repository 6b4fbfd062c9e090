"""The compared networks: the project's backbones, poolings and branches at a size for two cores."""

from typing import Literal

from torch import nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.config import StrictModel
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.base import Classifier
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches


class TextureNetConfig(StrictModel):
    """A 5x5 convolution with batch norm, then `layers`: none, or ReLU, conv1x1, batch norm, ReLU."""

    filters: int = 16
    hidden: int = 24
    layers: Literal["linear", "two-layer"] = "two-layer"
    pooling: Pooling = GapConfig()


class TextureNet(Backbone):
    """A 5x5 convolution, as large as the filters of the textures, and at most one more layer."""

    stem_parts = ()
    stage_names = ("layer1", "layer2")
    config: TextureNetConfig

    def __init__(self, config: TextureNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        conv = nn.Conv2d(3, config.filters, 5, bias=False)
        first = nn.Sequential(conv, nn.BatchNorm2d(config.filters))
        self.layer1 = nn.Sequential(first)
        self.layer2 = nn.Sequential()
        self.tap_channels = {"layer1.0": config.filters}
        self.channels = config.filters
        if config.layers == "two-layer":  # ReLU keeps its input, which a branch may tap
            conv = nn.Conv2d(config.filters, config.hidden, 1, bias=False)
            self.layer2.append(
                nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(config.hidden), nn.ReLU())
            )
            self.channels = self.tap_channels["layer2.0"] = config.hidden
        self.pooling = config.pooling.build(self.channels)
        self.fc = nn.Linear(self.pooling.out_features, num_classes)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Create an identity, because a branch pools the tapped feature map without further blocks."""
        del in_channels, out_channels, stride
        return nn.Identity()


class PlainTextureNet(Classifier, TextureNet):
    """The network without branches, with any global pooling."""

    inference_class = TextureNet


class DSoPTextureNetConfig(TextureNetConfig, DSoPConfig):
    """The two-layer network with branches."""


class DSoPTextureNet(DSoP, TextureNet):
    """Branches after the first convolution and at the end; the control uses average pooling in them."""

    inference_class = TextureNet
    config: DSoPTextureNetConfig

    def paper_branches(self) -> PaperBranches:
        """Return the branches for the texture network, which no paper describes."""
        return PaperBranches(blocks=(1, 1), widths=(32, 32))
