"""EfficientNet-b0 for 224-pixel images, with timm's state-dict keys.

Paper: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019),
Table 1.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialize
from sopdeploy.config import FractionBelowOne, StrictModel
from sopdeploy.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.layers.residual import mbconv


class MBConvStage(NamedTuple):
    """One row of the paper's Table 1."""

    kernel: int
    channels: int
    blocks: int


MBCONV_STAGES = {
    "blocks.0": MBConvStage(3, 16, 1),
    "blocks.1": MBConvStage(3, 24, 2),
    "blocks.2": MBConvStage(5, 40, 2),
    "blocks.3": MBConvStage(3, 80, 3),
    "blocks.4": MBConvStage(5, 112, 3),
    "blocks.5": MBConvStage(5, 192, 4),
    "blocks.6": MBConvStage(3, 320, 1),
}
KERNELS = {stage.channels: stage.kernel for stage in MBCONV_STAGES.values()}
HEAD_CHANNELS = 1280


class EfficientNetConfig(StrictModel):
    """Regularization: dropout before the classifier, and the stochastic depth of the last block.

    The drop probability of the blocks before the last one is lower, in proportion to their depth.
    """

    dropout: FractionBelowOne = 0.2
    stochastic_depth: FractionBelowOne = 0.2
    pooling: Pooling = GapConfig()


class EfficientNet(Backbone):
    """timm's stem, stages and 1x1 convolution to 1280 channels, global pooling, one linear layer."""

    stem_parts = ("conv_stem", "bn1")
    stage_names = tuple(MBCONV_STAGES)
    classifier_parts: tuple[str, ...] = ("pooling", "dropout", "classifier")
    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        timm = import_optional("timm", "timm", "sopdeploy[train]", MissingPackageError)
        network = timm.create_model("efficientnet_b0", drop_path_rate=config.stochastic_depth)
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks
        self.conv_head, self.bn2 = network.conv_head, network.bn2
        for name, stage in MBCONV_STAGES.items():
            self.tap_channels |= {f"{name}.{index}": stage.channels for index in range(stage.blocks)}
        self.dropout = nn.Dropout(config.dropout)
        self.pooling = config.pooling.build(HEAD_CHANNELS)
        self.classifier = self.pooling.classifier(num_classes)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build an MBConv with the kernel of the stage of *out_channels*, without stochastic depth."""
        return mbconv(in_channels, out_channels, stride, KERNELS[out_channels])

    def feature_maps(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map (B, 1280, h, w) after its activation, and the outputs of *taps*.

        A tap is a block, or `conv_head` for the last feature map itself.
        """
        x, tapped = super().feature_maps(images, taps)
        last: Tensor = self.bn2(self.conv_head(x))
        return last, [*tapped, last] if "conv_head" in taps else tapped
