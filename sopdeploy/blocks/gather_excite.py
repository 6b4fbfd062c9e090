"""Gather-Excite: what a neighbourhood holds says how to scale each value in it.

Paper: Hu et al., "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks" (NeurIPS
2018): GE-theta-minus averages and scales, GE-theta gathers by depth-wise convolutions, GE-theta-plus
adds SE's two layers between gathering and scaling (`parameters` "none", "gather", "gather+excite").
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sopdeploy.blocks.resampling import nearest_rows, resample

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
