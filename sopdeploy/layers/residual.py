"""Residual blocks, with the activation after the addition or before each convolution.

Papers: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Figs. 3 and 5; "Identity
Mappings in Deep Residual Networks" (ECCV 2016). Attributes have torchvision's names, so its weight files fit.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["projection", "pad"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution that keeps the size at stride 1; batch norm follows, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 1x1 convolution; batch norm follows, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class PaddedShortcut(nn.Module):
    """Shortcut without parameters ("option A"): subsample, then pad with zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        """Convert (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after))


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: Shortcut) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """relu(residual + shortcut); `downsample` is the shortcut where the shape changes."""

    downsample: nn.Module | None

    def residual(self, x: Tensor) -> Tensor:
        """Compute the residual without changing *x*."""
        raise NotImplementedError(f"{type(self).__name__}: residual of {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(residual + shortcut)."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.residual(x) + identity, inplace=True)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    expansion = 1

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, kind: Shortcut = "projection"
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, kind)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the second batch norm."""
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions and a shortcut.

    `middle` channels default to a quarter of the output's; ResNeXt sets them and splits the 3x3 convolution
    into `groups`. `stride_on` selects the convolution that strides: "3x3" is torchvision's and every released
    code's ("v1.5"), "1x1" the first paper's ("v1").
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
        self.downsample = _shortcut(in_channels, out_channels, stride, "projection")

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the third batch norm."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        result: Tensor = self.bn3(self.conv3(out))
        return result


class PreActBlock(ResidualBlock):
    """residual + shortcut, without an activation after the addition.

    Both read the activated input; an identity shortcut reads the input itself.
    """

    bn1: nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Compute residual + shortcut."""
        active = F.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(active)
        return self.residual(active) + identity


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    same_shape = stride == 1 and in_channels == out_channels
    return None if same_shape else conv1x1(in_channels, out_channels, stride)


class PreActBasicBlock(PreActBlock):
    """BN, ReLU, 3x3, BN, ReLU, 3x3: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the second convolution for an activated input."""
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
        self.downsample = _projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the output of the third convolution for an activated input."""
        middle = self.conv2(F.relu(self.bn2(self.conv1(x))))
        out: Tensor = self.conv3(F.relu(self.bn3(middle)))
        return out
