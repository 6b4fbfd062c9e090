"""First-order attention: Squeeze-and-Excitation, CBAM and Gather-Excite.

Papers: Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018), section 3; Woo et al., "CBAM" (ECCV 2018);
Hu et al., "Gather-Excite" (NeurIPS 2018). Linear layers on channel means are 1x1 convolutions with bias here.
"""

import torch
from torch import Tensor, nn

from sopdeploy.environment import import_optional
from sopdeploy.errors import MissingPackageError


def squeeze_excite(channels: int, reduction: int) -> nn.Module:
    """Build timm's Squeeze-and-Excitation, which scales a map (B, C, H, W) by channel; *reduction* is r.

    Global average pooling, linear layer to C / r (at least one), ReLU, linear layer to C, sigmoid.
    """
    timm = import_optional("timm.layers", "timm", "sopdeploy[train]", MissingPackageError)
    block: nn.Module = timm.SEModule(channels, rd_channels=max(1, channels // reduction))
    return block


def bottleneck_mlp(channels: int, reduction: int) -> nn.Sequential:
    """Build two linear layers on (B, C, 1, 1), with ReLU and C / *reduction* channels between them."""
    hidden = max(1, channels // reduction)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
    )


class CBAM(nn.Module):
    """Scale a feature map (B, C, H, W) by channel and by position; `reduction` is r.

    The convolution over positions has a 7x7 kernel, the best one in the paper.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.mlp = bottleneck_mlp(channels, reduction)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale (B, C, H, W) features by channel, then by position."""
        means_BC11 = features_BCHW.mean(dim=(2, 3), keepdim=True)
        maxima_BC11 = features_BCHW.amax(dim=(2, 3), keepdim=True)
        by_channel = features_BCHW * torch.sigmoid(self.mlp(means_BC11) + self.mlp(maxima_BC11))
        extremes_B2HW = torch.cat(
            [by_channel.amax(dim=1, keepdim=True), by_channel.mean(dim=1, keepdim=True)], dim=1
        )
        return by_channel * torch.sigmoid(self.bn(self.conv(extremes_B2HW)))


class GatherExcite(nn.Module):
    """Scale a feature map (B, C, H, W) by a function of all positions of each channel.

    Gathering has one weight per position, so it requires maps of *side* x *side*.
    """

    def __init__(self, channels: int, side: int, reduction: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
        self.gather = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.mlp = bottleneck_mlp(channels, reduction)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Scale (B, C, H, W) features by channel."""
        return features_BCHW * torch.sigmoid(self.mlp(self.gather(features_BCHW)))
