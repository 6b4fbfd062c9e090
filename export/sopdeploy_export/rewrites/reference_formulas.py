"""The formulas as the papers write them, for comparison: what `--no-lowering` exports.

Centring by the matrix I / M - 11^T / M^2, the trace by the identity, the Newton-Schulz loop without special
first and last steps, row batch norm and grouped convolution one after the other, all N experts with a
triangle each. Adaptive pooling has no ONNX form at most sizes, so the position block's resampling stays as it
is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.layers.attention.gsop_attention import ChannelAttention, RowConv
from sopdeploy.layers.covariance import at_least_float32, covariance_trace, frobenius_norm
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov
from sopdeploy_export.rewrites.context import RewriteContext

NAME = "textbook formula"


def textbook_covariance(x_BdM: Tensor) -> Tensor:
    """Return X (I / M - 11^T / M^2) X^T, in float32 at least."""
    x_BdM = at_least_float32(x_BdM)
    m = x_BdM.shape[2]
    centring = torch.eye(m, dtype=x_BdM.dtype) / m - torch.ones(m, m, dtype=x_BdM.dtype) / m**2
    return x_BdM @ centring @ x_BdM.transpose(1, 2)


class ReferenceRoot(nn.Module):
    """Feature map (B, d, H, W) in, upper triangle (B, d (d + 1) / 2) of N Newton-Schulz steps out."""

    triangle: Tensor

    def __init__(self, before: ISqrtCov) -> None:
        super().__init__()
        self.config = before.config
        self.register_buffer("triangle", before.triangle)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Return the triangle."""
        return self.matrix(features_BdHW).flatten(start_dim=1).index_select(1, self.triangle)

    def roots(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps that roots are taken of, and their roots."""
        return features_BdHW, self.matrix(features_BdHW)

    def matrix(self, features_BdHW: Tensor) -> Tensor:
        """Return the root (B, d, d)."""
        cov_Bdd = textbook_covariance(features_BdHW.flatten(start_dim=2))
        norm = covariance_trace(cov_Bdd) if self.config.prenorm == "trace" else frobenius_norm(cov_Bdd)
        norm = norm.clamp_min(SMALLEST_NORM)
        identity = torch.eye(cov_Bdd.shape[1], dtype=cov_Bdd.dtype)
        y, z = cov_Bdd / norm, identity.expand_as(cov_Bdd)
        for _ in range(self.config.iterations):
            t = 0.5 * (3.0 * identity - z @ y)
            y, z = y @ t, t @ z
        return y * norm.sqrt() if self.config.compensate else y


class ReferenceChannelAttention(nn.Module):
    """`ChannelAttention` with the centring matrix."""

    def __init__(self, before: ChannelAttention) -> None:
        super().__init__()
        self.pre_relu = before.pre_relu
        self.reduction, self.excitation = before.reduction, before.excitation

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the channels' weights (B, C, 1, 1)."""
        x = self.reduction(features_BCHW.relu() if self.pre_relu else features_BCHW)
        weights: Tensor = self.excitation(textbook_covariance(x.flatten(start_dim=2)))
        return weights


def grouped(before: RowConv) -> nn.Conv2d:
    """Return the grouped convolution that a row-wise one is."""
    rows = before.in_channels
    conv = nn.Conv2d(rows, before.out_channels, (rows, 1), groups=rows, bias=before.bias is not None)
    conv = conv.to(before.weight.dtype)
    conv.load_state_dict(before.state_dict())
    return conv


FORMULAS: dict[type[nn.Module], Any] = {
    RowConv: grouped,
    ChannelAttention: ReferenceChannelAttention,
    ISqrtCov: ReferenceRoot,
}


def apply(work: RewriteContext) -> None:
    """Put the papers' formulas into the network, each proved equal to what stood there."""
    for kind, build in FORMULAS.items():
        for where, _ in work.parts(kind):
            work.replace(NAME, where, build)
            shape = "x".join(map(str, work.calls[where].inputs[0].shape[1:]))
            work.note(NAME, where, f"{kind.__name__} of {shape}", "the paper's formula, for comparison")
