"""The excitation module of a GSoP block: a covariance matrix in, one weight in (0, 1) per channel out.

Paper: Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3.1, Table 2.
Letters: B images, n rows of the covariance (d channels or 64 positions), r = 4 outputs of each row.

The released code has no activation between the two convolutions of the channel-wise block and a
plain ReLU in the position-wise one; the paper has LReLU(0.1) in both.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "lrelu"]
OUTPUTS_PER_ROW = 4


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return *x* after nothing, ReLU or LReLU(0.1)."""
    if activation == "lrelu":
        return F.leaky_relu(x, 0.1)
    return F.relu(x) if activation == "relu" else x


class RowConv(nn.Conv2d):
    """Row-wise convolution: (B, n, n, 1) to (B, 4n, 1, 1); output 4i + r sees row i only.

    The paper's grouped convolution with kernel (n, 1), and its parameters, computed as one batched
    product: runtimes have slow kernels for a convolution of n groups whose output is one pixel.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(rows, OUTPUTS_PER_ROW * rows, (rows, 1), groups=rows)

    def forward(self, cov_Bnn1: Tensor) -> Tensor:
        """Return what the grouped convolution would."""
        rows = self.in_channels
        cov_nBn = cov_Bnn1.squeeze(3).transpose(0, 1)
        weight_nnr = self.weight.reshape(rows, OUTPUTS_PER_ROW, rows).transpose(1, 2)
        out_nBr = torch.matmul(cov_nBn, weight_nnr)
        out_BR11 = out_nBr.transpose(0, 1).reshape(-1, rows * OUTPUTS_PER_ROW, 1, 1)
        return out_BR11 if self.bias is None else out_BR11 + self.bias[:, None, None]


class Excitation(nn.Module):
    """Covariance (B, n, n) in, weights (B, out, 1, 1) in (0, 1) out.

    Row-wise batch norm, row-wise convolution n to 4n, activation, 1x1 convolution 4n to out, sigmoid.
    """

    def __init__(self, rows: int, out_channels: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.row_bn = nn.BatchNorm2d(rows)
        self.row_conv = RowConv(rows)
        self.conv = nn.Conv2d(OUTPUTS_PER_ROW * rows, out_channels, 1)

    def forward(self, cov_Bnn: Tensor) -> Tensor:
        """Return the weights."""
        rows_BR11 = self.row_conv(self.row_bn(cov_Bnn.unsqueeze(3)))
        return torch.sigmoid(self.conv(activate(rows_BR11, self.activation)))

    def extra_repr(self) -> str:
        """Name the activation in the printed module."""
        return f"activation={self.activation}"
