"""The row-wise batch norm scales and shifts whole rows, so it folds into the row-wise convolution."""

import torch
from torch import nn

from sopdeploy.layers.attention.gsop_attention import OUTPUTS_PER_ROW, Excitation, RowConv


def folded(bn: nn.BatchNorm2d, conv: RowConv) -> RowConv:
    """Return W_i * a_i and b + c_i * sum(W_i), for the norm's a_i x + c_i on row i."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    one = RowConv(conv.in_channels).double()
    repeated_scale = scale.repeat_interleave(OUTPUTS_PER_ROW)
    repeated_shift = shift.repeat_interleave(OUTPUTS_PER_ROW)
    with torch.no_grad():
        one.weight.copy_(conv.weight * repeated_scale[:, None, None, None])
        one.bias.copy_(conv.bias + conv.weight.sum(dim=(1, 2, 3)) * repeated_shift)
    return one


def test_row_norm_folds_into_the_row_convolution() -> None:
    torch.manual_seed(0)
    excitation = Excitation(32, 64, "lrelu").double().eval()
    for name, tensor in excitation.row_bn.named_parameters():
        nn.init.uniform_(tensor, 0.5, 2.0)
        assert name in {"weight", "bias"}
    excitation.row_bn.running_mean.uniform_(-1, 1)
    excitation.row_bn.running_var.uniform_(0.1, 3)
    cov_Bnn1 = torch.randn(3, 32, 32, 1, dtype=torch.float64)  # asymmetric: a column is no row
    with torch.no_grad():
        apart = excitation.row_conv(excitation.row_bn(cov_Bnn1))
        together = folded(excitation.row_bn, excitation.row_conv)(cov_Bnn1)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_rows_are_normalised_over_images_and_columns() -> None:
    torch.manual_seed(0)
    norm = Excitation(32, 64, "none").double().row_bn
    cov_Bnn1 = torch.randn(4, 32, 32, 1, dtype=torch.float64)
    mean = cov_Bnn1.mean(dim=(0, 2, 3), keepdim=True)
    variance = cov_Bnn1.var(dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(cov_Bnn1), (cov_Bnn1 - mean) / (variance + norm.eps).sqrt())
