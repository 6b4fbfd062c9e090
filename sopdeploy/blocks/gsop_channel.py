"""The channel-wise half of GSoP: channel correlations of the whole map say how to scale each channel.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3.1, Table 2.
Letters: B images, C channels, d channels after dimension reduction (DR), H height, W width.

The released code feeds DR with a rectified copy of the map (`pre_relu`; the map that is scaled stays
as it is) and lets DR stride by 2 in conv2_x (`dr_stride`). The covariance is the plain one, centred
and divided by the number of positions; the block takes no matrix root.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.blocks.gsop_excitation import Activation, Excitation
from sopdeploy.pooling.covariance import centred_positions, covariance
from sopdeploy.pooling.precision import at_least_float32, without_autocast


class ChannelAttention(nn.Module):
    """Feature map (B, C, H, W) in, channel weights (B, C, 1, 1) out."""

    def __init__(
        self, channels: int, width: int, dr_stride: int, activation: Activation, *, pre_relu: bool
    ) -> None:
        super().__init__()
        self.pre_relu = pre_relu
        self.reduction = nn.Sequential(
            nn.Conv2d(channels, width, 1, stride=dr_stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.excitation = Excitation(width, channels, activation)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the weights; the covariance is taken in float32 at least."""
        reduced_BdHW = self.reduction(F.relu(features_BCHW) if self.pre_relu else features_BCHW)
        with without_autocast(reduced_BdHW):
            cov_Bdd = covariance(centred_positions(at_least_float32(reduced_BdHW)))
        weights_BC11: Tensor = self.excitation(cov_Bdd)
        return weights_BC11

    def extra_repr(self) -> str:
        """Name the switch in the printed module."""
        return f"pre_relu={self.pre_relu}"
