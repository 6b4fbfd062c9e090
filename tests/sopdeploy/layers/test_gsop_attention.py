"""Row-wise convolution, resampling and batches of one image in GSoP's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sopdeploy.layers.attention.gsop_block import (
    RowConv,
    averaging_rows,
    nearest_rows,
    resample,
)


@pytest.mark.parametrize(("rows", "batch"), [(32, 1), (32, 5), (64, 2)])
def test_product_and_gradients_equal_the_grouped_convolution(rows: int, batch: int) -> None:
    torch.manual_seed(rows)
    conv = RowConv(rows).double()
    cov_Bnn1 = torch.randn(batch, rows, rows, 1, dtype=torch.float64, requires_grad=True)
    grouped = nn.Conv2d.forward(conv, cov_Bnn1)
    found = conv(cov_Bnn1)
    inputs = (cov_Bnn1, conv.weight, conv.bias)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (conv(cov_Bnn1), grouped))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert found.shape == (batch, 4 * rows, 1, 1)
    torch.testing.assert_close(found, grouped, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(conv(cov_Bnn1.transpose(1, 2)), grouped)


SIZES = [(8, 56), (8, 14), (8, 7), (56, 8), (14, 8), (5, 8)]


def ramp(size: int) -> torch.Tensor:
    return torch.arange(float(size * size), dtype=torch.float64).reshape(1, 1, size, size)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_averaging_equals_adaptive_average_pooling(size: int, target: int) -> None:
    found = resample(ramp(size), target, target, averaging_rows)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(ramp(size), target), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_nearest_equals_interpolate(size: int, target: int) -> None:
    found = resample(ramp(size), target, target, nearest_rows)
    assert torch.equal(found, F.interpolate(ramp(size), size=(target, target), mode="nearest"))
