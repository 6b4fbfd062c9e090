"""EfficientNet-b0 and EfficientNet-Lite0 to Lite4, with timm's state-dict keys.

Paper: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(ICML 2019), Table 1. The Lite networks of its authors have ReLU6 instead of SiLU, no
squeeze-and-excitation, a stem and a last convolution of a fixed width, and a first and a last
stage of a fixed depth. Convolutions are padded as in TensorFlow. The inverted bottleneck is that of Sandler et
al., "MobileNetV2" (CVPR 2018), section 3.3.
"""

import math
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.base.config import FractionBelowOne, Positive, StrictModel
from sopdeploy.base.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.backbones.base import Backbone, initialize

# The hidden width of MBConv's excitation is a quarter of the block's input channels
SQUEEZE = 4


def mbconv(in_channels: int, out_channels: int, stride: int = 1, kernel: int = 3) -> nn.Module:
    """Build timm's inverted bottleneck (MBConv) with an expansion of 6, SiLU and squeeze-and-excitation.

    It maps (B, in, H, W) to (B, out, H / stride, W / stride) without a final activation, and
    adds a shortcut if it keeps the shape.
    """
    module = "timm.models._efficientnet_blocks"
    blocks = import_optional(module, "timm", ".[train]", MissingPackageError)

    excitation = partial(blocks.SqueezeExcite, rd_channels=max(1, in_channels // SQUEEZE))
    return blocks.InvertedResidual(
        in_channels,
        out_channels,
        kernel,
        stride,
        exp_ratio=6,
        act_layer=nn.SiLU,
        se_layer=excitation,
    )


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
# Of the Lite networks:
STEM_CHANNELS = 32
STRIDES = dict(zip(MBCONV_STAGES, (1, 2, 2, 2, 1, 2, 1), strict=True))
# The last ones at their resolution
TAPPED_STAGES = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
DIVISOR = 8  # of the numbers of channels
EXPANSION = 6  # of all stages but the first


class EfficientNetConfig(StrictModel):
    """Regularization: dropout before the classifier, and the stochastic depth of the last block.

    The drop probability of the blocks before the last one is lower, in proportion to their
    depth.
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
        timm = import_optional("timm", "timm", ".[train]", MissingPackageError)
        network = timm.create_model("efficientnet_b0", drop_path_rate=config.stochastic_depth)

        # timm's layers under timm's names, so that its weight files fit.
        self.conv_stem = network.conv_stem
        self.bn1 = network.bn1
        self.blocks = network.blocks
        self.conv_head = network.conv_head
        self.bn2 = network.bn2

        for name, stage in MBCONV_STAGES.items():
            self.tap_channels |= {
                f"{name}.{index}": stage.channels for index in range(stage.blocks)
            }

        self.dropout = nn.Dropout(config.dropout)
        self.pooling = config.pooling.build(HEAD_CHANNELS)
        self.classifier = nn.Linear(self.pooling.out_features, num_classes)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build an MBConv with the kernel of the stage of *out_channels*, without stochastic depth."""
        return mbconv(in_channels, out_channels, stride, KERNELS[out_channels])

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map (B, 1280, h, w) after its activation, and the outputs of *taps*."""
        x, tapped = super().feature_maps(images, taps)
        last: Tensor = self.bn2(self.conv_head(x))  # bn2 includes the activation
        return last, tapped


class EfficientNetLiteConfig(StrictModel):
    """`width` and `depth` multiply channels and blocks of the stages; `dropout` precedes the classifier."""

    width: Positive = 1.0
    depth: Positive = 1.0
    dropout: FractionBelowOne = 0.2
    pooling: Pooling = GapConfig()


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's padding "SAME": of an odd number of zeros, more are at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Convert (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride))."""
        padding: list[int] = []  # zeros at the left, right, top and bottom
        for side in (x.shape[3], x.shape[2]):
            windows = (side + self.stride[0] - 1) // self.stride[0]  # side / stride, rounded up
            # The last window ends (windows - 1) * stride + kernel pixels from the start.
            zeros = max(0, (windows - 1) * self.stride[0] + self.kernel_size[0] - side)
            padding += [zeros // 2, zeros - zeros // 2]
        return super().forward(F.pad(x, padding))


def convolution(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Build a convolution without bias, because batch norm follows it; a *stride* pads as TensorFlow."""
    if stride == 1:
        return nn.Conv2d(
            in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False
        )

    return SameConv2d(
        in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False
    )


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Build a batch norm with TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class LiteBlock(nn.Sequential):
    """Inverted bottleneck: 1x1 convolution to *expansion* times the channels, depthwise and 1x1 convolution.

    With an *expansion* of 1, the first convolution is left out. A block that keeps the shape
    adds its input.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = channels * expansion

        # Each draws random weights. All are drawn, in this order, also those that stay unused:
        # so a seed gives the weights of earlier versions.
        depthwise = convolution(wide, wide, kernel, stride, groups=wide)
        expand = convolution(channels, wide)
        project = convolution(wide, out)

        # Names as in timm, in the order in which the layers run.
        if expansion > 1:
            layers = {"conv_pw": expand, "conv_dw": depthwise, "conv_pwl": project}
        else:
            project = convolution(wide, out)  # a second draw
            layers = {"conv_dw": depthwise, "conv_pw": project}

        # Each convolution has a batch norm, and all but the last an activation.
        for number, (name, layer) in enumerate(layers.items(), 1):
            self.add_module(name, layer)
            self.add_module(f"bn{number}", _batch_norm(layer.out_channels))
            if number < len(layers):
                self.add_module(f"act{number}", nn.ReLU6(inplace=True))

        self.keeps_shape = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Convert (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return out + x if self.keeps_shape else out


class EfficientNetLite(Backbone):
    """Stem, seven stages, 1x1 convolution to 1280 channels, global pooling, one linear layer."""

    stem_parts = ("conv_stem", "bn1", "act1")
    stage_names = tuple(MBCONV_STAGES)
    classifier_parts: tuple[str, ...] = ("pooling", "dropout", "classifier")
    config: EfficientNetLiteConfig

    def __init__(self, config: EfficientNetLiteConfig, num_classes: int) -> None:
        # The stem.
        super().__init__(config, num_classes)
        self.conv_stem = convolution(3, STEM_CHANNELS, kernel=3, stride=2)
        self.bn1 = _batch_norm(STEM_CHANNELS)
        self.act1 = nn.ReLU6(inplace=True)

        # Stages of blocks, scaled in depth and width; the first and the last keep their depth.
        channels = STEM_CHANNELS
        self.kernels: dict[int, int] = {}  # by the channels of a stage
        stages = []
        for name, stage in MBCONV_STAGES.items():
            is_fixed = name in {"blocks.0", "blocks.6"}  # the first stage and the last one
            count = stage.blocks if is_fixed else math.ceil(stage.blocks * config.depth)
            expansion = 1 if name == "blocks.0" else EXPANSION

            # Channels in multiples of 8 that lose at most a tenth.
            scaled = stage.channels * config.width
            out = max(DIVISOR, DIVISOR * math.floor(scaled / DIVISOR + 0.5))
            if out < 0.9 * scaled:
                out += DIVISOR

            blocks = []
            for index in range(count):
                stride = STRIDES[name] if index == 0 else 1
                blocks.append(LiteBlock(channels, out, stage.kernel, stride, expansion))
                channels = out
            self.kernels[out] = stage.kernel

            stages.append(nn.Sequential(*blocks))
            if name in TAPPED_STAGES:  # at its last block
                self.tap_channels[f"{name}.{count - 1}"] = out
        self.blocks = nn.Sequential(*stages)

        # The head.
        self.conv_head = convolution(channels, HEAD_CHANNELS)
        self.bn2 = _batch_norm(HEAD_CHANNELS)
        self.act2 = nn.ReLU6(inplace=True)
        self.pooling = config.pooling.build(HEAD_CHANNELS)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.pooling.out_features, num_classes)
        initialize(self)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build an inverted bottleneck with the kernel of the stage of *out_channels*."""
        kernel = self.kernels[out_channels]
        return LiteBlock(in_channels, out_channels, kernel, stride, EXPANSION)

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map (B, 1280, h, w) after its activation, and the outputs of *taps*."""
        x, tapped = super().feature_maps(images, taps)
        last: Tensor = self.act2(self.bn2(self.conv_head(x)))
        return last, tapped
