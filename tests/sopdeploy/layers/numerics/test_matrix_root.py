"""The iterated matrix root: its two forms, its accuracy and its symmetry."""

import pytest

from sopdeploy.layers.isqrt_cov import (
    ISqrtCov,
    covariance_root,
    gram_is_cheaper,
    prenormalize,
)
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from tests.sopdeploy.layers.numerics.references import relative_error, relu_features, textbook_root

PRENORMS = pytest.mark.parametrize("prenorm", ["trace", "frobenius"])


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


@pytest.mark.parametrize("iterations", [5, 10, 15])
@pytest.mark.parametrize("side", [3, 9], ids=["positions", "channels"])
def test_root_of_a_float32_map_is_symmetric_but_for_rounding(side: int, iterations: int) -> None:
    root = covariance_root(relu_features(2, 48, side).float(), NewtonSchulzConfig(iterations=iterations))
    assert (root - root.transpose(1, 2)).norm() < 1e-5 * root.norm()


@pytest.mark.parametrize("prenorm", ["trace", "frobenius"])
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
