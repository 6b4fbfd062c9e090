"""D2: five steps are not a square root, so nothing may replace them by one."""

import pytest
import torch

from sopdeploy.layers.isqrt_cov import covariance_root
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig, newton_schulz
from sopdeploy.layers.spectral import power, spectral
from tests.sopdeploy.layers.numerics.references import relative_error, relu_features


@pytest.mark.parametrize(("eigenvalue", "ratio"), [(1e-3, 0.24), (1 / 256, 0.45), (1e-2, 0.66), (0.1, 0.997)])
def test_five_steps_map_an_eigenvalue_to_a_part_of_its_root(eigenvalue: float, ratio: float) -> None:
    a = torch.diag(torch.tensor([eigenvalue, 1.0 - eigenvalue], dtype=torch.float64))[None]
    found = newton_schulz(a, 5)[0, 0, 0] / eigenvalue**0.5
    assert found.item() == pytest.approx(ratio, abs=5e-3)


def test_the_iterate_is_far_from_the_root_and_more_steps_come_nearer() -> None:
    features = relu_features(1, 64, 8)
    x = features.flatten(2) - features.flatten(2).mean(dim=2, keepdim=True)
    exact, _ = spectral(x @ x.transpose(1, 2) / 64, power(0.5))
    errors = [
        relative_error(covariance_root(features, NewtonSchulzConfig(iterations=n)), exact) for n in (3, 5, 15)
    ]
    assert errors[0] > errors[1] > 0.05
    assert errors[2] < 0.01
