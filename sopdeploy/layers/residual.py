"""Residual blocks of ResNets and pre-activation ResNets.

Papers: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Figs. 3 and 5;
"Identity Mappings in Deep Residual Networks" (ECCV 2016). Attributes have torchvision's names,
so its weight files fit.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["projection", "pad"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution that keeps the size at stride 1; batch norm follows, so it has no bias."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 1x1 convolution; batch norm follows, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class PaddedShortcut(nn.Module):
    """Shortcut without parameters ("option A"): subsample, then pad with zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.before = missing // 2
        self.after = missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        """Convert (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after))


def _build_shortcut(
    in_channels: int, out_channels: int, stride: int, kind: Shortcut | Literal["convolution"]
) -> nn.Module | None:
    """Build the shortcut of a block; `None`, the identity, if the block keeps the shape.

    The *kind* "projection" is a convolution and a batch norm, "convolution" has no batch norm.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PaddedShortcut(in_channels, out_channels, stride)

    convolution = conv1x1(in_channels, out_channels, stride)
    if kind == "convolution":
        return convolution
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """Base class of residual blocks, which compute relu(residual(x) + shortcut(x)).

    Attributes:
        pre_activation: Batch norm and ReLU precede the residual and the shortcut's convolution; an identity
            shortcut reads the input itself, and no activation follows the addition.
        downsample: The shortcut where the shape changes.
        attention: Scales the residual before the addition; `None` means no attention.
        attention_after: The attention follows the addition instead, with its own shortcut:
            out + attention(out).
    """

    pre_activation: ClassVar[bool] = False
    bn1: nn.BatchNorm2d
    downsample: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.Module | None = None
        self.attention_after = False

    def residual(self, x: Tensor) -> Tensor:
        """Compute the residual of *x*, activated before if `pre_activation` is set, without modifying it."""
        raise NotImplementedError(f"{type(self).__name__}: residual of {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block: (B, in, H, W) to (B, out, H / stride, W / stride)."""
        active = F.relu(self.bn1(x)) if self.pre_activation else x

        identity = x if self.downsample is None else self.downsample(active)
        residual = self.residual(active)
        if self.attention is not None and not self.attention_after:
            residual = self.attention(residual)  # the place in GSoP's released code

        out = residual + identity
        if not self.pre_activation:
            out = F.relu(out, inplace=True)
        if self.attention is not None and self.attention_after:
            out = out + self.attention(out)  # the place in GSoP's paper
        return out


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        kind: Shortcut = "projection",
    ) -> None:
        super().__init__()

        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)

        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _build_shortcut(in_channels, out_channels, stride, kind)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the second batch norm."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions and a shortcut.

    `middle` is the number of channels of the 3x3 convolution, by default a quarter of the
    output's; ResNeXt sets it and splits the convolution into `groups`. `stride_on` selects the
    convolution that has the stride: "3x3" in torchvision and all released code ("v1.5"), "1x1"
    in the first paper ("v1").
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        stride_on: Literal["1x1", "3x3"] = "3x3",
        middle: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        middle = out_channels // self.expansion if middle is None else middle
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)

        self.conv1 = conv1x1(in_channels, middle, first)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv3x3(middle, middle, second, groups)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv1x1(middle, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

        self.downsample = _build_shortcut(in_channels, out_channels, stride, "projection")

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the third batch norm."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))


class PreActBasicBlock(ResidualBlock):
    """BN, ReLU, 3x3, BN, ReLU, 3x3: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    pre_activation = True
    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.downsample = _build_shortcut(in_channels, out_channels, stride, "convolution")

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the second convolution for an activated input."""
        return self.conv2(F.relu(self.bn2(self.conv1(x))))


class PreActBottleneck(ResidualBlock):
    """BN, ReLU and a convolution, three times: 1x1 to a quarter of the channels, 3x3, 1x1 back."""

    pre_activation = True
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

        self.downsample = _build_shortcut(in_channels, out_channels, stride, "convolution")

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the third convolution for an activated input."""
        middle = self.conv2(F.relu(self.bn2(self.conv1(x))))
        return self.conv3(F.relu(self.bn3(middle)))
