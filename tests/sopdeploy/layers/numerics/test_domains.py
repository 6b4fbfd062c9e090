"""Positions or channels: the same polynomial, whichever of the two products it is iterated on."""

import pytest
import torch

from sopdeploy.layers.isqrt_cov import covariance_root, gram_is_cheaper, prenormalize
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from tests.sopdeploy.layers.numerics.references import relative_error, relu_features, textbook_root

PRENORMS = pytest.mark.parametrize("prenorm", ["trace", "frobenius"])


@PRENORMS
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 10])
@pytest.mark.parametrize(("channels", "side"), [(32, 3), (16, 1), (20, 4), (9, 5)])
def test_root_is_the_textbook_loop_in_float64(channels, side, iterations, compensate, prenorm) -> None:
    rule = NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
    features = relu_features(2, channels, side)
    if side == 1:
        assert (covariance_root(features, rule) == 0).all()
        return
    assert relative_error(covariance_root(features, rule), textbook_root(features, rule)) < 1e-10


@PRENORMS
@pytest.mark.parametrize(("channels", "side"), [(256, 7), (128, 8), (64, 7)])
def test_float32_over_positions_is_no_further_from_float64_than_over_channels(
    channels, side, prenorm
) -> None:
    rule = NewtonSchulzConfig(prenorm=prenorm)
    features = relu_features(2, channels, side)
    assert prenormalize(features, rule).use_gram
    exact = textbook_root(features, rule)
    by_channels = relative_error(textbook_root(features.float(), rule), exact)
    assert relative_error(covariance_root(features.float(), rule), exact) < min(1e-6, 1.5 * by_channels)


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
def test_the_cheaper_product_is_chosen(channels, positions, iterations, expected) -> None:
    assert gram_is_cheaper(channels, positions, iterations) is expected


def test_shapes_unknown_beforehand_stay_with_the_channels() -> None:
    class Unknown(int):
        """Stands for a symbolic size."""

    assert gram_is_cheaper(256, 49, 5)
    assert not gram_is_cheaper(256, Unknown(49), 5)


@pytest.mark.parametrize("side", [3, 8])
def test_root_grows_with_the_features(side: int) -> None:
    features = relu_features(2, 32, side)
    rule = NewtonSchulzConfig()
    torch.testing.assert_close(covariance_root(7.0 * features, rule), 7.0 * covariance_root(features, rule))
