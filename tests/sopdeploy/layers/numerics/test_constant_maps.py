"""D5: zero and constant maps give finite answers and gradients in every pooling, and disturb no neighbour."""

import pytest
import torch

from tests.sopdeploy.layers.numerics.all_poolings import EACH_POOLING, build


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
def test_a_zero_image_does_not_disturb_its_neighbours(choice) -> None:
    torch.manual_seed(0)
    pooling = build(choice, 8).eval()
    features = torch.rand(3, 8, 4, 4)
    alone = pooling(features[[0, 2]])
    features[1] = 0
    torch.testing.assert_close(pooling(features)[[0, 2]], alone, rtol=1e-4, atol=1e-6)


def test_a_constant_map_of_any_level_has_a_covariance_root_of_rounding_only() -> None:
    pooling = build("isqrt", 8)
    for level in (1e-3, 0.1, 7.7, 1e4):
        assert pooling(torch.full((1, 8, 7, 7), level)).abs().max() <= 1e-5 * level
