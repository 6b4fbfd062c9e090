"""D1: the gradient by hand is autograd's, and can be asked for again."""

import itertools

import pytest
import torch

from sopdeploy.layers.covariance import upper_triangle_indices
from sopdeploy.layers.isqrt_cov import ISqrtCov, ISqrtVector, isqrt_vector
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig

RULES = [
    NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
    for iterations, prenorm, compensate in itertools.product(
        (1, 2, 3, 5, 9), ("trace", "frobenius"), (True, False)
    )
] + [NewtonSchulzConfig(centered=False)]
SHAPES = pytest.mark.parametrize(("channels", "side"), [(6, 5), (12, 2)], ids=["channels", "positions"])


def gradient(function, features, triangle, rule, grad):
    return torch.autograd.grad(function(features, triangle, rule), features, grad)[0]


@SHAPES
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_handwritten_gradient_equals_autograd(channels: int, side: int, rule: NewtonSchulzConfig) -> None:
    torch.manual_seed(0)
    triangle = upper_triangle_indices(channels)
    features = torch.randn(3, channels, side, side, dtype=torch.float64).relu().requires_grad_()
    grad = torch.randn(3, len(triangle), dtype=torch.float64)
    expected = gradient(isqrt_vector, features, triangle, rule, grad)
    found = gradient(ISqrtVector.apply, features, triangle, rule, grad)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@SHAPES
def test_float32_gradient_is_as_accurate_as_autograd(channels: int, side: int) -> None:
    torch.manual_seed(1)
    triangle, rule = upper_triangle_indices(channels), NewtonSchulzConfig()
    features = torch.randn(3, channels, side, side).relu().requires_grad_()
    grad = torch.randn(3, len(triangle))
    exact = gradient(isqrt_vector, features.double(), triangle, rule, grad.double())
    hand = gradient(ISqrtVector.apply, features, triangle, rule, grad)
    autograd = gradient(isqrt_vector, features, triangle, rule, grad)
    assert (hand - exact).norm() <= 4 * (autograd - exact).norm()


@SHAPES
@pytest.mark.parametrize("prenorm", ["trace", "frobenius"])
def test_first_and_second_gradients_are_those_of_finite_differences(channels, side, prenorm) -> None:
    torch.manual_seed(2)
    layer = ISqrtCov(channels, NewtonSchulzConfig(prenorm=prenorm))
    features = torch.randn(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (features,), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (features,), fast_mode=True)


@pytest.mark.parametrize("side", [2, 5])
def test_training_and_inference_are_bit_identical(side: int) -> None:
    torch.manual_seed(4)
    layer = ISqrtCov(12)
    features = torch.randn(2, 12, side, side)
    assert torch.equal(layer(features.clone().requires_grad_()), layer(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_a_half_precision_map_has_its_type(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    layer = ISqrtCov(6)
    features = torch.randn(2, 6, 4, 4).to(dtype).requires_grad_()
    layer(features).sum().backward()
    assert features.grad.dtype == dtype
    wide = features.detach().float().requires_grad_()
    layer(wide).sum().backward()
    assert torch.equal(features.grad, wide.grad.to(dtype))
