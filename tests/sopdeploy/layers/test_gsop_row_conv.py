"""The row-wise convolution as a batched product: the paper's grouped convolution, number for number.

A covariance is symmetric and would hide rows taken for columns; these matrices are not.
"""

import pytest
import torch
from torch import nn

from sopdeploy.layers.attention.gsop_attention import RowConv, activate


@pytest.mark.parametrize(("rows", "batch"), [(32, 1), (32, 5), (64, 2)])
def test_product_equals_the_grouped_convolution_on_asymmetric_matrices(rows: int, batch: int) -> None:
    torch.manual_seed(rows)
    conv = RowConv(rows).double()
    cov_Bnn1 = torch.randn(batch, rows, rows, 1, dtype=torch.float64)
    grouped = nn.Conv2d.forward(conv, cov_Bnn1)
    found = conv(cov_Bnn1)
    assert found.shape == (batch, 4 * rows, 1, 1)
    torch.testing.assert_close(found, grouped, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(conv(cov_Bnn1.transpose(1, 2)), grouped)


def test_output_four_i_plus_r_sees_row_i_only() -> None:
    conv = RowConv(8).double()
    cov_Bnn1 = torch.randn(1, 8, 8, 1, dtype=torch.float64)
    changed = cov_Bnn1.clone()
    changed[:, 5] += 1
    moved = (conv(changed) - conv(cov_Bnn1)).flatten().abs() > 1e-12
    assert moved.nonzero().flatten().tolist() == [20, 21, 22, 23]


def test_gradients_equal_those_of_the_grouped_convolution() -> None:
    torch.manual_seed(0)
    conv = RowConv(16).double()
    cov_Bnn1 = torch.randn(2, 16, 16, 1, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 64, 1, 1, dtype=torch.float64)
    inputs = (cov_Bnn1, conv.weight, conv.bias)
    ours = torch.autograd.grad((conv(cov_Bnn1) * towards).sum(), inputs)
    theirs = torch.autograd.grad((nn.Conv2d.forward(conv, cov_Bnn1) * towards).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "expected"), [("none", -2.0), ("relu", 0.0), ("lrelu", -0.2)])
def test_activation_of_a_negative_value(kind: str, expected: float) -> None:
    x = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(activate(x, kind), torch.tensor([expected, 3.0], dtype=torch.float64))
