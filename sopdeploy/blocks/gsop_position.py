"""The position-wise half of GSoP: correlations between positions say how to scale each of them.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3.2, Table 2.
Letters: B images, C channels, d channels after dimension reduction (DR), s side of the small map
(8), P = s*s positions on it, H height, W width.

Assumptions where the paper only says "down-sampling" and "up sampling": adaptive average pooling to
s x s, nearest neighbour back to H x W. The released code differs in four named ways: `rectify`
"scaled" (no ReLU after DR, but one on the scaled map, which `GSoPBlock` applies), `covariance`
"uncentred", `upsampling` "average" (adaptive average pooling used upwards) and a plain ReLU.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.blocks.gsop_excitation import Activation, Excitation
from sopdeploy.blocks.resampling import averaging_rows, nearest_rows, resample
from sopdeploy.frozen import Frozen
from sopdeploy.pooling.covariance import centred_positions, covariance
from sopdeploy.pooling.precision import at_least_float32, without_autocast


class PositionSwitches(Frozen):
    """What changes the numbers of the position-wise block; defaults are the paper's."""

    side: int = 8
    activation: Activation = "lrelu"
    rectify: Literal["reduced", "scaled"] = "reduced"
    covariance: Literal["centred", "uncentred"] = "centred"
    upsampling: Literal["nearest", "average"] = "nearest"
    pre_relu: bool = False


class PositionAttention(nn.Module):
    """Feature map (B, C, H, W) in, position weights (B, 1, H, W) out."""

    def __init__(self, channels: int, width: int, switches: PositionSwitches) -> None:
        super().__init__()
        self.switches = switches
        self.reduction = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width))
        positions = switches.side**2
        self.excitation = Excitation(positions, positions, switches.activation)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the weights; the covariance is taken in float32 at least."""
        switches, side = self.switches, self.switches.side
        height, width = features_BCHW.shape[2:]
        reduced_BdHW = self.reduction(F.relu(features_BCHW) if switches.pre_relu else features_BCHW)
        if switches.rectify == "reduced":
            reduced_BdHW = F.relu(reduced_BdHW)
        with without_autocast(reduced_BdHW):
            small_Bdss = resample(at_least_float32(reduced_BdHW), side, side, averaging_rows)
            small_BdP = small_Bdss.flatten(start_dim=2)
            uncentred = switches.covariance == "uncentred"
            cov_BPP = released_covariance(small_BdP) if uncentred else position_covariance(small_BdP)
        weights_B1ss = self.excitation(cov_BPP).reshape(-1, 1, side, side)
        rows = nearest_rows if switches.upsampling == "nearest" else averaging_rows
        return resample(weights_B1ss, height, width, rows)

    def extra_repr(self) -> str:
        """Name the switches in the printed module."""
        return ", ".join(f"{name}={value}" for name, value in self.switches)


def position_covariance(small_BdP: Tensor) -> Tensor:
    """Return the (B, P, P) covariance between positions; the d channels are the samples."""
    return covariance(centred_positions(small_BdP.transpose(1, 2)))


def released_covariance(small_BdP: Tensor) -> Tensor:
    """Return X^T X / P - s s^T / P^2, where s (B, P) sums over the d channels.

    The released code means to centre, but its centring matrix is built for P samples while there
    are d: with d different from P the mean stays in, and the result has negative eigenvalues.
    """
    positions = small_BdP.shape[2]
    sums_B1P = small_BdP.sum(dim=1, keepdim=True)
    return (
        small_BdP.transpose(1, 2) @ small_BdP / positions - sums_B1P.transpose(1, 2) @ sums_B1P / positions**2
    )
