"""NetVLAD: residuals of a feature map to the words of a learned codebook, a network of GM-SOP's Table 3.

Paper: Arandjelovic et al., "NetVLAD: CNN Architecture for Weakly Supervised Place Recognition"
(CVPR 2016), Eq. (4). Letters: B images, C channels, M positions, K words.
"""

import math

import torch
from torch import Tensor, nn

from sopdeploy.layers.pooling.base import GlobalPooling, unit_length


class NetVLAD(GlobalPooling):
    """Pool (B, C, H, W) maps to sums of residuals to the centers of K *words*, (B, K C).

    Assumption, because GM-SOP's paper does not say: the centers c start from N(0, 1 / C), and
    the soft assignment of positions x, a 1x1 convolution, as the softmax of -|x - c|^2 / 2.
    """

    def __init__(self, channels: int, words: int) -> None:
        super().__init__()
        self.assignment = nn.Conv2d(channels, words, 1)
        self.centres = nn.Parameter(torch.randn(words, channels) / math.sqrt(channels))
        self.out_features = words * channels

        # The logits start as x c - |c|^2 / 2: |x|^2 / 2 is the same for all words, so the
        # softmax does not change.
        with torch.no_grad():
            self.assignment.weight.copy_(self.centres[:, :, None, None])
            bias = -0.5 * self.centres.square().sum(dim=1)
            self.assignment.get_parameter("bias").copy_(bias)

    def pool(self, features: Tensor) -> Tensor:
        """Compute each word's sum of a (x - c), scaled to unit length per word, then as a whole (B, K C).

        The shares a are the softmax over words. The sum over positions is (sum of a x) - (sum
        of a) c.
        """
        a_BKM = self.assignment(features).flatten(start_dim=2).softmax(dim=1)
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        residual_BKC = a_BKM @ x_BMC - a_BKM.sum(dim=2, keepdim=True) * self.centres
        return unit_length(unit_length(residual_BKC, dim=2).flatten(start_dim=1), dim=1)
