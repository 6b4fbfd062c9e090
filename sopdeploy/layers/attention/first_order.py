"""Squeeze-and-Excitation: channel means say how to scale each channel.

Paper: Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018), section 3: global average pooling, linear
layer to C / r, ReLU, linear layer to C, sigmoid. The linear layers are 1x1 convolutions with bias here.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.layers.attention.gsop_attention import nearest_rows, resample
from sopdeploy.layers.residual import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock


class SqueezeExcite(nn.Module):
    """Feature map (B, C, H, W) in, the map scaled by channel out; `reduction` is r."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the scaled map."""
        means_BC11 = features_BCHW.mean(dim=(2, 3), keepdim=True)
        return features_BCHW * torch.sigmoid(self.fc2(F.relu(self.fc1(means_BC11))))


class CBAM(nn.Module):
    """Feature map (B, C, H, W) in, the map scaled by channel and by position out; `reduction` is r."""

    def __init__(self, channels: int, reduction: int, kernel: int) -> None:
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the scaled map."""
        means_BC11 = features_BCHW.mean(dim=(2, 3), keepdim=True)
        maxima_BC11 = features_BCHW.amax(dim=(2, 3), keepdim=True)
        by_channel = features_BCHW * torch.sigmoid(self.mlp(means_BC11) + self.mlp(maxima_BC11))
        extremes_B2HW = torch.cat(
            [by_channel.amax(dim=1, keepdim=True), by_channel.mean(dim=1, keepdim=True)], dim=1
        )
        return by_channel * torch.sigmoid(self.bn(self.conv(extremes_B2HW)))


Extent = Literal["global", 2, 4, 8]
Parameters = Literal["none", "gather", "gather+excite"]
HALVINGS = {2: 1, 4: 2, 8: 3}


class GatherExcite(nn.Module):
    """Feature map (B, C, H, W) in, the scaled map out.

    *extent* is the ratio of the map's side to the gathered one's; "global" gathers to one pixel. Global
    gathering with parameters has one weight per position, so it is bound to maps of *side* x *side*.
    """

    def __init__(
        self, channels: int, side: int, extent: Extent, parameters: Parameters, reduction: int
    ) -> None:
        super().__init__()
        self.gather = averaging(extent) if parameters == "none" else convolving(channels, side, extent)
        self.mlp: nn.Module = nn.Identity()
        if parameters == "gather+excite":
            hidden = channels // reduction
            self.mlp = nn.Sequential(
                nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
            )
        self.whole = extent == "global"

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the scaled map; what was gathered is brought back by nearest neighbour."""
        weights_BChw = torch.sigmoid(self.mlp(self.gather(features_BCHW)))
        if not self.whole:
            height, width = features_BCHW.shape[2:]
            weights_BChw = resample(weights_BChw, height, width, nearest_rows)
        return features_BCHW * weights_BChw


class GlobalMean(nn.Module):
    """(B, C, H, W) in, the mean over positions (B, C, 1, 1) out."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the means."""
        return features_BCHW.mean(dim=(2, 3), keepdim=True)


def averaging(extent: Extent) -> nn.Module:
    """Return gathering without parameters: windows of 2 extent - 1 that do not count their padding."""
    if extent == "global":
        return GlobalMean()
    return nn.AvgPool2d(2 * extent - 1, stride=extent, padding=extent - 1, count_include_pad=False)


def convolving(channels: int, side: int, extent: Extent) -> nn.Sequential:
    """Return gathering by depth-wise convolutions: one of the map's size, or 3x3 ones that halve it."""
    if extent == "global":
        conv = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels))
    layers: list[nn.Module] = []
    for _ in range(HALVINGS[extent]):
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class AttentionInside(ResidualBlock):
    """To be mixed in before a residual block: the attention scales the residual."""

    attention: nn.Module

    def residual(self, x: Tensor) -> Tensor:
        """Return the attended residual."""
        attended: Tensor = self.attention(super().residual(x))
        return attended


class AttentionAfter(ResidualBlock):
    """To be mixed in before a residual block: the block's output, plus the same attended."""

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return out + attention(out)."""
        out = super().forward(x)
        attended: Tensor = self.attention(out)
        return out + attended


class BasicBlockAttendedInside(AttentionInside, BasicBlock):
    """Two 3x3 convolutions whose result is attended, then added to the shortcut."""


class BottleneckAttendedInside(AttentionInside, Bottleneck):
    """A bottleneck whose residual is attended, then added to the shortcut."""


class BottleneckAttendedAfter(AttentionAfter, Bottleneck):
    """A bottleneck, then an attention with a shortcut of its own."""


class PreActBottleneckAttendedInside(AttentionInside, PreActBottleneck):
    """A pre-activation bottleneck whose residual is attended, then added to the shortcut."""


class PreActBottleneckAttendedAfter(AttentionAfter, PreActBottleneck):
    """A pre-activation bottleneck, then an attention with a shortcut of its own."""
