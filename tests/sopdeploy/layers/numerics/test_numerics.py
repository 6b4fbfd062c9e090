"""The numerics of second-order poolings: roots, gradients, repeated eigenvalues and extreme inputs."""

import itertools
from typing import get_args

import pytest
import torch

from sopdeploy.errors import TrainingError
from sopdeploy.layers.covariance import upper_triangle_indices
from sopdeploy.layers.isqrt_cov import (
    ISqrtCov,
    ISqrtVector,
    NewtonSchulzConfig,
    Prenorm,
    covariance_root,
    gram_is_cheaper,
    isqrt_vector,
    prenormalize,
)
from sopdeploy.layers.pooling.covariance import (
    LogEuclideanConfig,
    MpnCovConfig,
    logarithm_of_eigenvalues,
    root_of_eigenvalues,
    spectral,
)
from tests.sopdeploy.layers.numerics.all_poolings import (
    EACH_POOLING,
    build,
    name,
    relative_error,
    relu_features,
    textbook_root,
)
from tests.sweep.smallest import POOLINGS

PRENORMS = pytest.mark.parametrize("prenorm", get_args(Prenorm))


@PRENORMS
@pytest.mark.parametrize(("channels", "side"), [(256, 7), (128, 8), (64, 7)])
def test_gram_form_is_as_accurate_as_the_covariance_form(channels, side, prenorm) -> None:
    rule = NewtonSchulzConfig(prenorm=prenorm)
    features = relu_features(2, channels, side)
    assert prenormalize(features, rule).use_gram

    exact = textbook_root(features, rule)
    by_channels = relative_error(textbook_root(features.float(), rule), exact)
    assert relative_error(covariance_root(features.float(), rule), exact) < 1.5 * by_channels


@pytest.mark.parametrize(
    ("channels", "positions", "iterations", "expected"),
    [
        (256, 196, 5, True),
        (256, 49, 5, True),
        (128, 64, 5, True),
        (256, 242, 5, True),  # 0.945 d
        (256, 243, 5, False),
        (128, 196, 5, False),
        (64, 3136, 5, False),
        (256, 196, 1, False),  # one product over channels, two of the map over positions
        (256, 49, 1, True),
    ],
)
def test_the_cheaper_form_is_selected(channels, positions, iterations, expected) -> None:
    assert gram_is_cheaper(channels, positions, iterations) is expected


@pytest.mark.parametrize("prenorm", get_args(Prenorm))
@pytest.mark.parametrize("iterations", range(1, 16))
@pytest.mark.parametrize("side", [3, 9], ids=["rank-deficient", "full rank"])
def test_forward_and_backward_stay_finite_and_near_float64(side, iterations, prenorm) -> None:
    layer = ISqrtCov(48, NewtonSchulzConfig(iterations=iterations, prenorm=prenorm))
    exact = relu_features(2, 48, side).requires_grad_()
    rough = exact.detach().float().requires_grad_()
    for features in (exact, rough):
        layer(features).square().sum().backward()

    assert relative_error(layer(rough), layer(exact)) < 1e-4
    assert relative_error(rough.grad, exact.grad) < 1e-3


RULES = [
    NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
    for iterations, prenorm, compensate in itertools.product(
        (1, 2, 3, 5, 9), get_args(Prenorm), (True, False)
    )
]

SHAPES = pytest.mark.parametrize(
    ("channels", "side"), [(6, 5), (12, 2)], ids=["channels", "positions"]
)


def gradient(function, features, triangle, rule, grad):
    return torch.autograd.grad(function(features, triangle, rule), features, grad)[0]


@SHAPES
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_handwritten_gradient_equals_autograd(
    channels: int, side: int, rule: NewtonSchulzConfig
) -> None:
    torch.manual_seed(0)
    triangle = upper_triangle_indices(channels)
    features = torch.randn(3, channels, side, side, dtype=torch.float64).relu().requires_grad_()
    grad = torch.randn(3, len(triangle), dtype=torch.float64)
    expected = gradient(isqrt_vector, features, triangle, rule, grad)
    found = gradient(ISqrtVector.apply, features, triangle, rule, grad)

    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("prenorm", get_args(Prenorm))
def test_first_and_second_gradients_are_those_of_finite_differences(
    channels, side, prenorm
) -> None:
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


CONFIGS = [MpnCovConfig(), LogEuclideanConfig()]
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=["mpncov", "deepo2p"])


@EACH_CONFIG
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels_give_finite_gradients(config, dtype: torch.dtype) -> None:
    features = relu_features(2, 16, 5).to(dtype)
    features[:, 3:9] = 0  # six eigenvalues of exactly 0
    features.requires_grad_()
    vector = config.build(16)(features)
    vector.square().sum().backward()

    assert torch.isfinite(vector).all()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize(
    "function", [root_of_eigenvalues, logarithm_of_eigenvalues], ids=["root", "log"]
)
def test_equal_eigenvalues_use_the_derivative(function) -> None:
    a = (2.0 * torch.eye(3, dtype=torch.float64))[None].requires_grad_()
    direction = torch.tensor([[[1.0, 2, 0], [2, -1, 3], [0, 3, 0.5]]], dtype=torch.float64)
    value = spectral(a, function)
    (found,) = torch.autograd.grad(value, a, direction)
    slope = function(torch.full((1, 3), 2.0, dtype=torch.float64))[1][0, 0]

    torch.testing.assert_close(found, slope * direction)


def test_second_derivatives_are_rejected() -> None:
    features = relu_features(1, 4, 4).requires_grad_()
    loss = MpnCovConfig().build(4)(features).sum()

    with pytest.raises(TrainingError, match="pooling isqrt"):
        torch.autograd.grad(loss, features, create_graph=True)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.mark.parametrize("choice", [c for c in POOLINGS if "width" not in c], ids=name)
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
