"""D7: rounding makes products asymmetric; the iteration must not let that grow."""

import pytest
import torch

from sopdeploy.layers.isqrt_cov import covariance_root
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig, newton_schulz
from tests.sopdeploy.layers.numerics.references import relu_features


@pytest.mark.parametrize("iterations", [5, 10, 15])
@pytest.mark.parametrize("side", [3, 9], ids=["positions", "channels"])
def test_root_of_a_float32_map_is_symmetric_but_for_rounding(side: int, iterations: int) -> None:
    root = covariance_root(relu_features(2, 48, side).float(), NewtonSchulzConfig(iterations=iterations))
    assert (root - root.transpose(1, 2)).norm() < 1e-5 * root.norm()


def test_asymmetry_of_an_input_grows_so_products_of_one_operand_are_taken() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    a = x @ x.transpose(1, 2)
    a = a / a.diagonal(dim1=1, dim2=2).sum()
    skew = torch.randn_like(a)
    skew = 1e-3 * a.norm() * (skew - skew.transpose(1, 2)) / (skew - skew.transpose(1, 2)).norm()
    growth = []
    for iterations in (5, 10):
        root = newton_schulz(a + skew, iterations)
        growth.append(float((root - root.transpose(1, 2)).norm() / root.norm()) / 1e-3)
    assert growth[1] > growth[0] > 1.0
