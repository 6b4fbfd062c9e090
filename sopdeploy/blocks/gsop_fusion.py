"""Fusing the two tensors that channel-wise and position-wise GSoP make of one feature map.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 4.1, Table 4(b).
Letters: B images, C channels, H height, W width.

What the released code calls average is the sum, without a half. For concatenation the paper says
one convolution that keeps the tensor's size, and no more; the code's form is the one that is built.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

FusionKind = Literal["average", "sum", "maximum", "concatenation"]
CHANNELS_PER_GROUP = 64
MOST_GROUPS = 32


class Concatenation(nn.Module):
    """Two tensors (B, C, H, W) in, one out: grouped convolutions with kernel (k, 1), sum, batch norm.

    The same as one convolution of the tensors' concatenation. k is 11, 9, 7, 5 for C = 256, 512,
    1024, 2048: the fewer the groups, the longer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = channels // CHANNELS_PER_GROUP
        reach = int(math.log2(MOST_GROUPS / groups)) + 2
        kernel, padding = (2 * reach + 1, 1), (reach, 0)
        self.conv_channel = nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups)
        self.conv_position = nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, by_channel: Tensor, by_position: Tensor) -> Tensor:
        """Return the fused tensor."""
        fused: Tensor = self.bn(self.conv_channel(by_channel) + self.conv_position(by_position))
        return fused


class Fusion(nn.Module):
    """Two tensors (B, C, H, W) in, their mean, sum or larger values out; it has no parameters."""

    def __init__(self, kind: Literal["average", "sum", "maximum"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, by_channel: Tensor, by_position: Tensor) -> Tensor:
        """Return the fused tensor."""
        if self.kind == "maximum":
            return torch.maximum(by_channel, by_position)
        summed = by_channel + by_position
        return summed if self.kind == "sum" else summed * 0.5

    def extra_repr(self) -> str:
        """Name the kind in the printed module."""
        return self.kind


def fusion(kind: FusionKind, channels: int) -> nn.Module:
    """Return what makes one tensor of two."""
    return Concatenation(channels) if kind == "concatenation" else Fusion(kind)
