"""What is scaled is the map as it came in: negative values stay, and nothing writes into it."""

import pytest
import torch

from sopdeploy.layers.attention.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig

KINDS = ["channel", "position", "average", "sum", "maximum", "concatenation"]


def small(attention: str, **switches: object) -> GSoPBlock:
    torch.manual_seed(0)
    config = GSoPBlockConfig(attention=attention, cov_width=32, position_side=4, **switches)
    return GSoPBlock(config, 64, dr_stride=1).double()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("attention", KINDS)
def test_input_is_left_as_it_was(attention: str, *, released: bool) -> None:
    block = small(attention, **(RELEASED_BLOCK if released else {}))
    features = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    before = features.clone()
    assert block(features).shape == features.shape
    assert torch.equal(features, before)


@pytest.mark.parametrize("switches", [{}, RELEASED_BLOCK])
def test_channel_block_scales_negative_values_too(switches: dict) -> None:
    block = small("channel", **switches).eval()
    features = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    ratio = block(features) / features
    assert ((ratio > 0) & (ratio < 1)).all()
    torch.testing.assert_close(ratio, ratio.mean(dim=(2, 3), keepdim=True).expand_as(ratio))
    assert (block(features) < 0).any()


def test_position_block_weights_are_shared_by_channels() -> None:
    block = small("position").eval()
    features = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    ratio = block(features) / features
    torch.testing.assert_close(ratio, ratio.mean(dim=1, keepdim=True).expand_as(ratio))


def test_released_position_block_rectifies_its_result() -> None:
    features = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    assert (small("position", position_rectify="scaled")(features) >= 0).all()
    assert (small("position")(features) < 0).any()


def test_rectified_copy_feeds_only_the_covariance() -> None:
    """With `pre_relu` a negative value changes nothing but its own product."""
    block = small("channel", pre_relu=True).eval()
    features = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    features[0, 0, 0, 0] = -1.0
    changed = features.clone()
    changed[0, 0, 0, 0] = -9.0
    difference = block(changed) - block(features)
    assert difference[0, 0, 0, 0] < 0
    assert difference.count_nonzero() == 1


def test_gradient_is_that_of_finite_differences() -> None:
    block = small("maximum", **RELEASED_BLOCK).eval()
    features = torch.randn(1, 64, 4, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(features)
    weights = torch.randn_like(features)
    (gradient,) = torch.autograd.grad((block(features) * weights).sum(), features)
    step = 1e-6
    with torch.no_grad():
        ahead = (block(features + step * direction) * weights).sum()
        behind = (block(features - step * direction) * weights).sum()
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("attention", "combine"),
    [
        ("average", lambda c, p: (c + p) / 2),
        ("sum", lambda c, p: c + p),
        ("maximum", torch.maximum),
    ],
)
def test_fusions_without_parameters(attention: str, combine) -> None:
    block = small(attention).eval()
    features = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    by_channel = features * block.channel(features)
    by_position = features * block.position(features)
    torch.testing.assert_close(block(features), combine(by_channel, by_position))
