"""Squeeze-and-Excitation: channel means say how to scale each channel.

Paper: Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018), section 3: global average pooling, linear
layer to C / r, ReLU, linear layer to C, sigmoid. The linear layers are 1x1 convolutions with bias here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
