"""Residual blocks with the activation before the convolutions: pre-activation ResNets and WRN.

Papers: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016), Fig. 4 (e); Zagoruyko and
Komodakis, "Wide Residual Networks" (BMVC 2016), Fig. 1.

Where a block changes the shape, its shortcut is a 1x1 convolution without batch norm of the activated
input, as in both papers' released code; elsewhere the input itself is added.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.blocks.residual import ResidualBlock, conv1x1, conv3x3


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    """Return the shortcut's convolution; `None` where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return None
    return conv1x1(in_channels, out_channels, stride)


class PreActBlock(ResidualBlock):
    """residual + shortcut; nothing follows the addition."""

    bn1: nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Return residual + shortcut; both see the activated input, an identity sees the input itself."""
        active = F.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(active)
        return self.residual(active) + identity


class PreActBasicBlock(PreActBlock):
    """BN, ReLU, 3x3, BN, ReLU, 3x3: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Return the output of the second convolution for an input that is already activated."""
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(x))))
        return out


class PreActBottleneck(PreActBlock):
    """BN, ReLU and a convolution, three times: 1x1 to a quarter of the channels, 3x3, 1x1 back."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        middle = out_channels // self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = conv3x3(middle, middle, stride)
        self.bn3 = nn.BatchNorm2d(middle)
        self.conv3 = conv1x1(middle, out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Return the output of the third convolution for an input that is already activated."""
        middle = self.conv2(F.relu(self.bn2(self.conv1(x))))
        out: Tensor = self.conv3(F.relu(self.bn3(middle)))
        return out
