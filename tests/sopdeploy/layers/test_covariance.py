import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.layers.covariance import (
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
    upper_triangle_indices,
)


@given(channels=st.integers(1, 6), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 99))
def test_covariance_is_numpys_biased_one(channels: int, height: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(3.0, 2.0, (2, channels, height, width))
    found = covariance(centered_and_scaled(torch.from_numpy(features)))
    for image, cov in zip(features, found, strict=True):
        expected = np.atleast_2d(np.cov(image.reshape(channels, -1), bias=True))
        np.testing.assert_allclose(cov, expected, rtol=1e-9, atol=1e-12)


def test_covariance_equals_the_centring_matrix_of_the_paper() -> None:
    x = torch.randn(1, 5, 3, 4, dtype=torch.float64)
    flat, positions = x.flatten(2), 12
    centring = (torch.eye(positions, dtype=x.dtype) - 1 / positions) / positions
    torch.testing.assert_close(covariance(centered_and_scaled(x)), flat @ centring @ flat.mT)


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


def test_half_precision_products_stay_in_range_at_large_maps() -> None:
    features = 50 * torch.randn(1, 4, 56, 56)
    exact = covariance(centered_and_scaled(features))
    half = covariance(centered_and_scaled(features.half()))
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), exact, rtol=5e-3, atol=5)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_triangle_goes_row_by_row_with_the_diagonal(channels: int) -> None:
    expected = [i * channels + j for i in range(channels) for j in range(i, channels)]
    assert upper_triangle_indices(channels).tolist() == expected
