"""D3: singular covariances stay finite in float32 for every N that the config accepts."""

import pytest
import torch

from sopdeploy.layers.isqrt_cov import ISqrtCov, covariance_root
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from tests.sopdeploy.layers.numerics.references import relative_error, relu_features


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


def test_dead_channels_and_repeated_positions_stay_finite_at_fifteen_steps() -> None:
    features = relu_features(2, 48, 7).float()
    features[:, ::2] = 0
    features[:, :, 3:] = features[:, :, :1]
    root = covariance_root(features, NewtonSchulzConfig(iterations=15))
    assert torch.isfinite(root).all()
    assert (root[:, ::2] == 0).all()
