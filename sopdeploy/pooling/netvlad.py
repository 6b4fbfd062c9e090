"""NetVLAD: a bag of visual words whose assignment is soft, so that it learns.

Paper: Arandjelovic et al., "NetVLAD: CNN architecture for weakly supervised place recognition" (CVPR
2016), Eq. (4); the GM-SOP paper compares with 64 words on 128 channels (Table 3).
Letters: B images, C channels, M positions, K words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NetVLAD(nn.Module):
    """Feature map (B, C, H, W) in, normalised residuals to the words (B, K C) out."""

    def __init__(self, channels: int, words: int) -> None:
        super().__init__()
        self.assign = nn.Conv2d(channels, words, 1)
        self.centres = nn.Parameter(torch.randn(words, channels) / math.sqrt(channels))
        self.out_features = words * channels

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the residuals, each word's at unit length, then the whole vector's."""
        share_BKM = self.assign(features_BCHW).flatten(start_dim=2).softmax(dim=1)
        x_BMC = features_BCHW.flatten(start_dim=2).transpose(1, 2)
        residual_BKC = share_BKM @ x_BMC - share_BKM.sum(dim=2, keepdim=True) * self.centres
        return F.normalize(F.normalize(residual_BKC, dim=2).flatten(start_dim=1), dim=1)
