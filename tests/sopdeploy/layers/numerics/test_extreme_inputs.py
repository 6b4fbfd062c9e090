"""Half-precision, zero and constant maps in every pooling."""

import pytest
import torch

from tests.sopdeploy.layers.numerics.all_poolings import CHOICES, EACH_POOLING, build, name

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.mark.parametrize("choice", [c for c in CHOICES if "width" not in c], ids=name)
@HALVES
def test_half_precision_maps_equal_float32_maps(choice, dtype) -> None:
    torch.manual_seed(0)
    pooling = build(choice, 8).eval()
    features = torch.randn(2, 8, 4, 4).relu().to(dtype)
    found = pooling(features).float()
    torch.testing.assert_close(found, pooling(features.float()), rtol=1e-2, atol=1e-3)


@EACH_POOLING
def test_autocast_changes_nothing_but_convolutions(choice) -> None:
    torch.manual_seed(1)
    pooling = build(choice, 8).eval()
    features = torch.randn(2, 8, 4, 4).relu()
    expected = pooling(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pooling(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@HALVES
@pytest.mark.parametrize("side", [4, 40], ids=["positions", "channels"])
def test_large_half_precision_features_do_not_overflow(dtype, side: int) -> None:
    torch.manual_seed(2)
    pooling = build("isqrt", 32)
    features = (500.0 * torch.randn(1, 32, side, side).relu()).to(dtype).requires_grad_()
    vector = pooling(features)
    vector.sum().backward()
    assert torch.isfinite(vector).all()
    assert torch.isfinite(features.grad).all()
    torch.testing.assert_close(vector, pooling(features.float()))


@EACH_POOLING
@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_constant_maps_are_finite_forward_and_backward(choice, level: float) -> None:
    pooling = build(choice, 8)
    features = torch.full((2, 8, 3, 3), level, requires_grad=True)
    vector = pooling(features)
    vector.sum().backward()
    assert torch.isfinite(vector).all()
    assert torch.isfinite(features.grad).all()


@EACH_POOLING
def test_a_zero_image_does_not_change_other_images(choice) -> None:
    torch.manual_seed(0)
    pooling = build(choice, 8).eval()
    features = torch.rand(3, 8, 4, 4)
    alone = pooling(features[[0, 2]])
    features[1] = 0
    torch.testing.assert_close(pooling(features)[[0, 2]], alone, rtol=1e-4, atol=1e-6)
