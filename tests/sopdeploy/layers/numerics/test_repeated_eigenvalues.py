"""D4: gradients through eigenvalues are right where these differ and finite where they repeat."""

import pytest
import torch

from sopdeploy.errors import TrainingError
from sopdeploy.layers.pooling.covariance import LogEuclideanConfig, MpnCovConfig
from sopdeploy.layers.spectral import Logarithm, Power, spectral
from tests.sopdeploy.layers.numerics.references import relu_features

CONFIGS = [MpnCovConfig(), MpnCovConfig(power=0.7), LogEuclideanConfig()]
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=["mpncov", "mpncov-0.7", "deepo2p"])


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


@pytest.mark.parametrize("function", [Power(0.5), Power(0.3), Logarithm(1e-3)], ids=["root", "power", "log"])
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
    with pytest.raises(TrainingError, match="train with pooling isqrt"):
        torch.autograd.grad(loss, features, create_graph=True)
