"""The GSoP block and attention against their formulas and their scaling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sopdeploy.layers.gsop_block import (
    Concatenation,
    GSoPBlock,
    GSoPBlockConfig,
    RowConv,
    averaging_rows,
    nearest_rows,
    resample,
)


@pytest.mark.parametrize("channels", [64, 256])
def test_concatenation_is_one_convolution_of_the_concatenated_tensors(channels: int) -> None:
    torch.manual_seed(0)
    fusion = Concatenation(channels).double().eval()
    one, two = (torch.randn(1, channels, 5, 2, dtype=torch.float64) for _ in range(2))
    groups = channels // 64
    interleaved = torch.stack(
        [one.unflatten(1, (groups, 64)), two.unflatten(1, (groups, 64))], dim=2
    )
    weight = torch.cat([fusion.conv_channel.weight, fusion.conv_position.weight], dim=1)
    bias = fusion.conv_channel.bias + fusion.conv_position.bias
    padding = fusion.conv_channel.padding
    summed = F.conv2d(interleaved.flatten(1, 3), weight, bias, padding=padding, groups=groups)

    torch.testing.assert_close(fusion(one, two), fusion.bn(summed), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ["channel", "position"])
def test_covariance_is_taken_in_float32_under_autocast(attention: str) -> None:
    torch.manual_seed(0)
    block = GSoPBlock(
        GSoPBlockConfig(attention=attention, cov_width=32), 64, dr_stride=1
    ).eval()
    half = getattr(block, attention)
    types: list[torch.dtype] = []
    half.reduction.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    half.excitation.register_forward_pre_hook(lambda _, args: types.append(args[0].dtype))
    features = torch.randn(2, 64, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = block(features)

    assert types == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(under_autocast.float(), block(features), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("rows", "batch"), [(32, 1), (32, 5), (64, 2)])
def test_product_and_gradients_equal_the_grouped_convolution(rows: int, batch: int) -> None:
    torch.manual_seed(rows)
    conv = RowConv(rows).double()
    cov_Bnn1 = torch.randn(batch, rows, rows, 1, dtype=torch.float64, requires_grad=True)
    grouped = nn.Conv2d.forward(conv, cov_Bnn1)
    found = conv(cov_Bnn1)
    inputs = (cov_Bnn1, conv.weight, conv.bias)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), inputs) for out in (conv(cov_Bnn1), grouped)
    )

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
    torch.testing.assert_close(
        found, F.adaptive_avg_pool2d(ramp(size), target), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_nearest_equals_interpolate(size: int, target: int) -> None:
    found = resample(ramp(size), target, target, nearest_rows)
    assert torch.equal(found, F.interpolate(ramp(size), size=(target, target), mode="nearest"))
