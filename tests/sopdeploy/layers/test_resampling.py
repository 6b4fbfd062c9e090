"""Resampling by two constant matrices equals PyTorch's own, and adaptive averaging is no interpolation."""

import pytest
import torch
import torch.nn.functional as F

from sopdeploy.layers.attention.gsop_attention import averaging_rows, nearest_rows, resample

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
