"""CBAM: channel means and maxima scale the channels, then the positions are scaled.

Paper: Woo et al., "CBAM: Convolutional Block Attention Module" (ECCV 2018), section 3: one shared
two-layer perceptron with C / r hidden units on the average and on the maximum over positions, summed,
sigmoid; then a 7x7 convolution on [maximum, mean] over channels, sigmoid. As in the authors' code, the
perceptron has biases, the 7x7 convolution none but a batch norm.
"""

import torch
from torch import Tensor, nn


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
