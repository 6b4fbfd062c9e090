"""Covariance and Newton-Schulz iteration."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sopdeploy.layers.covariance import (
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
)
from sopdeploy.layers.newton_schulz import newton_schulz


@given(channels=st.integers(1, 6), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 99))
def test_covariance_equals_numpy(channels: int, height: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(3.0, 2.0, (2, channels, height, width))
    found = covariance(centered_and_scaled(torch.from_numpy(features)))
    for image, cov in zip(features, found, strict=True):
        expected = np.atleast_2d(np.cov(image.reshape(channels, -1), bias=True))
        np.testing.assert_allclose(cov, expected, rtol=1e-9, atol=1e-12)


def test_trace_and_norm_are_those_of_the_covariance() -> None:
    x = centered_and_scaled(torch.randn(3, 7, 4, 4, dtype=torch.float64))
    cov = covariance(x)
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(covariance_trace(covariance(x)), trace[:, None, None])
    torch.testing.assert_close(frobenius_norm(cov), torch.linalg.matrix_norm(cov)[:, None, None])


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4, -3.3])
def test_trace_of_a_constant_map_is_never_negative(level: float) -> None:
    x = centered_and_scaled(torch.full((1, 64, 14, 14), level))
    assert 0 <= covariance_trace(covariance(x)).item() <= (abs(level) * 1e-5) ** 2 * 64


def normalised(batch: int, channels: int, positions: int) -> Tensor:
    x = torch.randn(batch, channels, positions, dtype=torch.float64).relu()
    x = x - x.mean(dim=2, keepdim=True)
    cov = x @ x.mT / positions
    return cov / cov.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_gradients_are_those_of_finite_differences(iterations: int) -> None:
    torch.manual_seed(3)
    a = normalised(1, 4, 20).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, iterations), (a,))
