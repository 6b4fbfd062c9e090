"""Row-wise convolution, resampling and batches of one image in GSoP's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sopdeploy import create_model
from sopdeploy.layers.attention.gsop_attention import (
    OUTPUTS_PER_ROW,
    Excitation,
    RowConv,
    activate,
    averaging_rows,
    nearest_rows,
    resample,
)
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig


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


def test_rows_are_normalized_over_images_and_columns() -> None:
    torch.manual_seed(0)
    norm = Excitation(32, 64, "none").double().row_bn
    cov_Bnn1 = torch.randn(4, 32, 32, 1, dtype=torch.float64)
    mean = cov_Bnn1.mean(dim=(0, 2, 3), keepdim=True)
    variance = cov_Bnn1.var(dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(cov_Bnn1), (cov_Bnn1 - mean) / (variance + norm.eps).sqrt())


@pytest.mark.parametrize("attention", ["channel", "position", "maximum", "concatenation"])
def test_block_trains_on_one_image(attention: str) -> None:
    torch.manual_seed(0)
    config = GSoPBlockConfig(attention=attention, cov_width=32, position_side=4)
    block = GSoPBlock(config, 64, dr_stride=1).double()
    block(torch.randn(1, 64, 6, 6, dtype=torch.float64)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_image_and_its_batch_agree_in_eval() -> None:
    torch.manual_seed(0)
    network = create_model("gsop-net2-preact-resnet29", num_classes=5).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together = network(images)
        apart = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-10)


def test_single_position_gives_a_zero_covariance_and_finite_numbers() -> None:
    block = GSoPBlock(GSoPBlockConfig(cov_width=32), 64, dr_stride=2).eval()
    features = torch.randn(2, 64, 1, 1, requires_grad=True)
    scaled = block(features)
    scaled.sum().backward()
    assert scaled.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()


SIZES = [
    (8, 56),
    (8, 28),
    (8, 14),
    (8, 16),
    (8, 7),
    (8, 9),
    (56, 8),
    (28, 8),
    (14, 8),
    (7, 8),
    (5, 8),
    (8, 8),
]


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


@pytest.mark.parametrize(("target", "same"), [(16, True), (56, True), (14, False), (28, False)])
def test_averaging_upwards_is_nearest_only_at_integer_factors(target: int, *, same: bool) -> None:
    by_average = resample(ramp(8), target, target, averaging_rows)
    assert torch.equal(by_average, resample(ramp(8), target, target, nearest_rows)) is same


def test_averaging_8_to_14_straddles_two_sources() -> None:
    row = resample(ramp(8), 14, 14, averaging_rows)[0, 0, 0]
    assert row[:5].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_sides_are_resampled_apart() -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 3, 10, 6, dtype=torch.float64)
    found = resample(x_BCHW, 4, 9, averaging_rows)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(x_BCHW, (4, 9)), rtol=0, atol=1e-12)
