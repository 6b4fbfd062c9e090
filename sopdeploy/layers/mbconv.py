"""MBConv: EfficientNet's inverted bottleneck with squeeze-and-excitation.

Papers: Sandler et al., "MobileNetV2" (CVPR 2018), section 3.3; Tan and Le, "EfficientNet" (ICML 2019).
Attributes have timm's names, so its weight files fit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.layers.residual import conv1x1

SQUEEZE = 4  # the hidden width of the excitation is a quarter of the block's input channels


def _depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)


class SwishExcitation(nn.Module):
    """Scale each channel of (B, C, H, W) by a function of all channels' means."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, middle, 1)
        self.conv_expand = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale *x* by values between 0 and 1."""
        squeezed = x.mean(dim=(2, 3), keepdim=True)
        scale: Tensor = self.conv_expand(F.silu(self.conv_reduce(squeezed))).sigmoid()
        return x * scale


class StochasticDepth(nn.Module):
    """In training, set an image's residual to 0 with probability `drop`; divide the others by 1 - drop.

    Paper: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016). torchvision's equivalent is not
    used because importing torchvision would slow down every command.
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, residual: Tensor) -> Tensor:
        """Compute (B, C, H, W) residuals, some of them 0; eval mode returns the input."""
        if not self.training or self.drop == 0:
            return residual
        kept = torch.rand(residual.shape[0], 1, 1, 1, device=residual.device) >= self.drop
        return residual * (kept / (1 - self.drop)).to(residual.dtype)


class DepthwiseSeparable(nn.Module):
    """MBConv without expansion: depthwise convolution, excitation, 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv_dw = _depthwise(in_channels, kernel, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.se = SwishExcitation(in_channels, max(1, in_channels // SQUEEZE))
        self.conv_pw = conv1x1(in_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, out, H / stride, W / stride); no activation follows."""
        out: Tensor = self.se(F.silu(self.bn1(self.conv_dw(x))))
        out = self.bn2(self.conv_pw(out))
        return self.stochastic_depth(out) + x if self.has_shortcut else out


class MBConv(nn.Module):
    """Expand six times, convolve depthwise, excite, project; add a shortcut where the shape stays."""

    expansion = 6

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, drop: float = 0.0
    ) -> None:
        super().__init__()
        middle = in_channels * self.expansion
        self.conv_pw = conv1x1(in_channels, middle)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv_dw = _depthwise(middle, kernel, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.se = SwishExcitation(middle, max(1, in_channels // SQUEEZE))
        self.conv_pwl = conv1x1(middle, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, out, H / stride, W / stride); no activation follows."""
        out: Tensor = F.silu(self.bn1(self.conv_pw(x)))
        out = self.se(F.silu(self.bn2(self.conv_dw(out))))
        out = self.bn3(self.conv_pwl(out))
        return self.stochastic_depth(out) + x if self.has_shortcut else out


def swish_reduction(channels: int, width: int) -> nn.Sequential:
    """Build DR that ends with swish: 1x1 convolution without bias, batch norm, swish."""
    return nn.Sequential(conv1x1(channels, width), nn.BatchNorm2d(width), nn.SiLU(inplace=True))
