"""Images have the layout that a network is trained with."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT, Normalize, images_format
from sopdeploy.training.device import find_images_format

RULES = Preprocess(resize=8, crop=8)
GRAY = Preprocess(channels=1, resize=8, crop=8, mean=0.25, std=0.5)


class Views(nn.Module):
    """Views its feature map (B, 4, S, S) of images of C *channels* with *axes* as (B, -1)."""

    def __init__(self, *axes: int, channels: int = 3) -> None:
        super().__init__()
        self.axes = axes
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).permute(*self.axes).view(len(images), -1)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [((0, 1, 2, 3), torch.contiguous_format), ((0, 2, 3, 1), torch.channels_last)],
    ids=["of the map", "of its transposition"],
)
def test_a_run_trains_with_the_layout_that_the_network_can_view(
    axes: Any, expected: Any
) -> None:
    network: Any = Views(*axes)
    assert find_images_format({12}, network, torch.device("cpu"), "views") == expected


def test_a_network_without_a_layout_is_refused_with_the_size() -> None:
    network: Any = Views(0, 2, 1, 3)
    with pytest.raises(ConfigError, match=r"views .* \d+ pixels"):
        find_images_format({12}, network, torch.device("cpu"), "views")


def test_the_layout_is_that_of_the_record_or_else_of_the_weights() -> None:
    network = nn.Sequential(Views(0, 1, 2, 3))
    assert images_format(network) == torch.contiguous_format

    network.to(memory_format=torch.channels_last)
    assert images_format(network) == torch.channels_last

    vars(network[0])[IMAGES_FORMAT] = torch.contiguous_format
    assert images_format(network) == torch.contiguous_format


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalized_images_have_the_layout(layout: torch.memory_format) -> None:
    normalized = Normalize(RULES, layout)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))

    assert normalized.shape == (2, 3, 8, 8)
    assert normalized.is_contiguous(memory_format=layout)


def test_gray_images_are_those_of_pillow_before_it_rounds() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    pixels[1] = pixels[1, :, :, :1]  # the second is gray already
    normalized = Normalize(GRAY, torch.contiguous_format)(torch.from_numpy(pixels))
    assert normalized.shape == (2, 1, 8, 8)

    levels = 255 * (0.5 * normalized[:, 0].numpy() + 0.25)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in pixels]
    assert np.abs(levels[0] - expected[0]).max() <= 0.51
    assert np.abs(levels[1] - expected[1]).max() < 1e-4


def test_a_network_trains_on_the_channels_that_it_takes() -> None:
    network: Any = Views(0, 1, 2, 3, channels=1)
    cpu = torch.device("cpu")

    assert find_images_format({12}, network, cpu, "views", 1) == torch.contiguous_format
    with pytest.raises(ConfigError, match="channels"):
        find_images_format({12}, network, cpu, "views")
