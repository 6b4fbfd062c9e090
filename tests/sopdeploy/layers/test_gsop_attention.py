"""Row-wise convolution, resampling and batches of one image in GSoP's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sopdeploy.layers.attention.gsop_attention import (
    RowConv,
    activate,
    averaging_rows,
    nearest_rows,
    resample,
)
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig


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


@pytest.mark.parametrize(("kind", "expected"), [("none", -2.0), ("relu", 0.0), ("lrelu", -0.2)])
def test_activation_of_a_negative_value(kind: str, expected: float) -> None:
    x = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(activate(x, kind), torch.tensor([expected, 3.0], dtype=torch.float64))


def test_single_position_gives_a_zero_covariance_and_finite_numbers() -> None:
    block = GSoPBlock(GSoPBlockConfig(cov_width=32), 64, dr_stride=2).eval()
    features = torch.randn(2, 64, 1, 1, requires_grad=True)
    scaled = block(features)
    scaled.sum().backward()
    assert scaled.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()


SIZES = [*((8, n) for n in (56, 28, 14, 16, 7, 9, 8)), *((n, 8) for n in (56, 28, 14, 7, 5))]


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


def test_sides_are_resampled_apart() -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 3, 10, 6, dtype=torch.float64)
    found = resample(x_BCHW, 4, 9, averaging_rows)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(x_BCHW, (4, 9)), rtol=0, atol=1e-12)
