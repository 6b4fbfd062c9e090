import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig

PRENORMS = ["trace", "frobenius"]


def reference(features: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """The layer step by step in float64: centering matrix, plain loop, triangle by two loops."""
    x = features.double().flatten(2)
    _, channels, positions = x.shape
    centering = (torch.eye(positions, dtype=x.dtype) - 1 / positions) / positions
    rows = []
    for cov in x @ centering @ x.mT:
        norm = cov.trace() if config.prenorm == "trace" else cov.norm()
        identity = torch.eye(channels, dtype=x.dtype)
        y, z = cov / norm, identity
        for _ in range(config.iterations):
            step = (3 * identity - z @ y) / 2
            y, z = y @ step, step @ z
        if config.compensate:
            y = y * norm.sqrt()
        rows.append(torch.stack([y[i, j] for i in range(channels) for j in range(i, channels)]))
    return torch.stack(rows)


@pytest.mark.parametrize("prenorm", PRENORMS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("width", "side"), [(6, 7), (16, 3), (1, 4)], ids=["M>d", "M<d", "one channel"])
def test_layer_equals_a_reference_in_float64(prenorm, compensate: bool, width: int, side: int) -> None:
    torch.manual_seed(0)
    for iterations in range(1, 10):
        config = NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
        features = torch.randn(2, width, side, side).relu()
        expected = reference(features, config)
        layer = ISqrtCov(width, config)
        torch.testing.assert_close(layer(features.double()), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer(features).double(), expected, rtol=1e-3, atol=1e-5)


@given(scale=st.floats(1e-3, 1e4), shift=st.floats(-10, 10), seed=st.integers(0, 99))
def test_output_scales_with_the_features_and_ignores_their_mean(scale, shift, seed) -> None:
    layer = ISqrtCov(5)
    features = torch.randn(1, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = scale * layer(features)
    torch.testing.assert_close(layer(scale * (features + shift)), expected, rtol=1e-6, atol=1e-8 * scale)
