"""The formulas as the papers write them, exported with `--no-lowering`.

They center with the matrix I / M - 11^T / M^2, compute the trace with the identity, run the Newton-Schulz
loop without special first and last steps, apply row batch norm and grouped convolution one after the other,
and evaluate all N experts with one triangle each. The resampling matrices of the position block stay, because
adaptive pooling has no ONNX form at most sizes.
"""

import torch
from torch import Tensor, nn

from sopdeploy.layers.attention.gsop_attention import ChannelAttention, RowConv
from sopdeploy.layers.covariance import at_least_float32, covariance_trace, frobenius_norm
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov
from sopdeploy_export.rewrites.context import Build

NAME = "textbook formula"


def reference_covariance(x_BdM: Tensor) -> Tensor:
    """Compute X (I / M - 11^T / M^2) X^T in float32 or float64."""
    x_BdM = at_least_float32(x_BdM)
    m = x_BdM.shape[2]
    centering = torch.eye(m, dtype=x_BdM.dtype) / m - torch.ones(m, m, dtype=x_BdM.dtype) / m**2
    return x_BdM @ centering @ x_BdM.transpose(1, 2)


class ReferenceRoot(nn.Module, ExportHints):
    """`ISqrtCov`, computed with the loop of the paper (iSQRT-COV, Eq. 4)."""

    keep_float32 = True
    computes_roots = True
    triangle: Tensor

    def __init__(self, before: ISqrtCov) -> None:
        super().__init__()
        self.config = before.config
        self.register_buffer("triangle", before.triangle)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle (B, d (d + 1) / 2), row by row."""
        return self.roots(features_BdHW)[1].flatten(start_dim=1).index_select(1, self.triangle)

    def roots(self, features_BdHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps and their roots (B, d, d), for the parity checks."""
        cov_Bdd = reference_covariance(features_BdHW.flatten(start_dim=2))
        norm = covariance_trace(cov_Bdd) if self.config.prenorm == "trace" else frobenius_norm(cov_Bdd)
        norm = norm.clamp_min(SMALLEST_NORM)
        identity = torch.eye(cov_Bdd.shape[1], dtype=cov_Bdd.dtype)
        y, z = cov_Bdd / norm, identity.expand_as(cov_Bdd)
        for _ in range(self.config.iterations):
            t = 0.5 * (3.0 * identity - z @ y)
            y, z = y @ t, t @ z
        return features_BdHW, y * norm.sqrt() if self.config.compensate else y


class ReferenceChannelAttention(nn.Module, ExportHints):
    """`ChannelAttention` with the centering matrix (GSoP, section 3.1)."""

    keep_output_dtype = True

    def __init__(self, before: ChannelAttention) -> None:
        super().__init__()
        self.pre_relu = before.pre_relu
        self.reduction, self.excitation = before.reduction, before.excitation

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the channel weights (B, C, 1, 1)."""
        x = self.reduction(features_BCHW.relu() if self.pre_relu else features_BCHW)
        weights: Tensor = self.excitation(reference_covariance(x.flatten(start_dim=2)))
        return weights


def grouped_convolution(before: RowConv) -> nn.Conv2d:
    """Build the grouped `nn.Conv2d` that is equal to the row-wise convolution *before*."""
    rows = before.in_channels
    conv = nn.Conv2d(rows, before.out_channels, (rows, 1), groups=rows, bias=before.bias is not None)
    conv = conv.to(before.weight.dtype)
    conv.load_state_dict(before.state_dict())
    return conv


FORMULAS: dict[str, Build] = {
    "row_convolution": grouped_convolution,
    "channel_covariance": ReferenceChannelAttention,
    "newton_schulz": ReferenceRoot,
}
