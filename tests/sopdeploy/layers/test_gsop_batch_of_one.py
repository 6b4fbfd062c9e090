"""Batch norms of a single image: rows have columns to normalise over, so a GSoP-Net trains on one image."""

import pytest
import torch

from sopdeploy import create_model
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig


@pytest.mark.parametrize("attention", ["channel", "position", "maximum", "concatenation"])
def test_block_learns_from_one_image(attention: str) -> None:
    torch.manual_seed(0)
    config = GSoPBlockConfig(attention=attention, cov_width=32, position_side=4)
    block = GSoPBlock(config, 64, dr_stride=1).double()
    block(torch.randn(1, 64, 6, 6, dtype=torch.float64)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_image_and_its_batch_agree_in_eval() -> None:
    torch.manual_seed(0)
    network = create_model("gsop-net2-preact-resnet29", num_classes=5).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together = network(images)
        apart = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-10)


def test_single_position_gives_a_zero_covariance_and_finite_numbers() -> None:
    block = GSoPBlock(GSoPBlockConfig(cov_width=32), 64, dr_stride=2).eval()
    features = torch.randn(2, 64, 1, 1, requires_grad=True)
    scaled = block(features)
    scaled.sum().backward()
    assert scaled.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()
