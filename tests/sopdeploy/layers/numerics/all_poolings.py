"""Every pooling once, and reference computations for tests of poolings."""

import pydantic
import pytest
import torch
from torch import Tensor

from sopdeploy.layers.isqrt_cov import NewtonSchulzConfig
from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.layers.pooling.registry import Pooling
from tests.sweep.smallest import POOLINGS


def name(choice: dict[str, object]) -> str:
    return "-".join(str(value) for value in choice.values())


EACH_POOLING = pytest.mark.parametrize("choice", POOLINGS, ids=name)


def build(choice: object, channels: int) -> GlobalPooling:
    return pydantic.TypeAdapter(Pooling).validate_python(choice).build(channels)


def textbook_root(features: Tensor, rule: NewtonSchulzConfig) -> Tensor:
    x = features.flatten(2)
    x = x - x.mean(dim=2, keepdim=True)
    cov = x @ x.transpose(1, 2) / x.shape[2]
    trace = cov.diagonal(dim1=1, dim2=2).sum(dim=1)
    norms = {"trace": trace, "frobenius": torch.linalg.matrix_norm(cov)}
    norm = norms[rule.prenorm][:, None, None]
    identity = torch.eye(cov.shape[1], dtype=cov.dtype)
    y = cov / norm
    z = identity.expand_as(cov)
    for _ in range(rule.iterations):
        step = 0.5 * (3.0 * identity - z @ y)
        y, z = y @ step, step @ z
    return y * norm.sqrt() if rule.compensate else y


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def relu_features(batch: int, channels: int, side: int, *, seed: int = 0) -> Tensor:
    """Return correlated non-negative float64 maps, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        / channels**0.5
    )
    raw = torch.randn(batch, channels, side * side, generator=generator, dtype=torch.float64)
    return (mixing @ raw).relu().view(batch, channels, side, side)
