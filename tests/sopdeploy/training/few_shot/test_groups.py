"""Copies by the features of a network: changed, turned and cropped ones beside different images."""

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from sopdeploy.data.photos.copies import shrink
from sopdeploy.data.photos.photo import ArrayImages, LabeledImages
from sopdeploy.training.few_shot.default_network import (
    has_default_weights,
    open_default_network,
)
from sopdeploy.training.few_shot.features import FeatureBatch
from sopdeploy.training.few_shot.groups import group_by_features
from tests.sopdeploy.data.photos.test_copies import encoded, scene

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded": lambda image: Image.open(io.BytesIO(encoded(image))),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "cropped": lambda image: image.crop((8, 6, 144, 108)),
    "turned by a quarter": lambda image: image.rotate(90, expand=True),
    "mirrored": ImageOps.mirror,
    "squashed": lambda image: image.crop((20, 0, 140, 120)).resize((160, 120)),
}


@pytest.mark.skipif(
    not has_default_weights(), reason="needs the weights of the default network"
)
def test_changed_copies_are_grouped_with_their_image_and_different_ones_are_not():
    images = [scene(number) for number in range(40)]
    copies = [change(images[number]) for number, change in enumerate(CHANGES.values())]
    pixels = np.stack([np.asarray(image.resize((224, 224))) for image in images + copies])
    classes = np.arange(len(pixels)) % 2
    groups = group_by_features(
        open_default_network(), ArrayImages(("a", "b"), pixels, classes)
    ).groups

    assert groups.tolist() == [*range(40), *range(len(CHANGES))]


class PlannedOutputs(NamedTuple):
    """Stands for a network: its maps (N, C, H, W) are `maps`, in batches of four."""

    maps: torch.Tensor

    def batches(self, _images: LabeledImages, indices: list[int]) -> Iterator[FeatureBatch]:
        small = np.stack([shrink(scene(number)) for number in indices])
        for start in range(0, len(indices), 4):
            chosen = indices[start : start + 4]
            yield FeatureBatch(
                chosen,
                np.asarray(chosen, np.int64),
                np.zeros(len(chosen), np.int64),
                small[chosen],
                list(map(str, chosen)),
                self.maps[chosen].mean(dim=(2, 3)),
                {"last": self.maps[chosen]},
            )


@pytest.mark.parametrize("known", [None, [0, 1, 2, 0, *range(4, 24)]])
def test_images_with_similar_maps_or_a_known_group_are_one_group(
    known: list[int] | None,
):
    random = torch.Generator().manual_seed(0)
    vectors = 3.0 + torch.randn(24, 64, generator=random)
    vectors[20] = vectors[3] + 0.3 * torch.randn(64, generator=random)
    maps = vectors[:, :, None, None] + torch.randn(24, 64, 5, 5, generator=random)
    images = ArrayImages(
        ("a", "b"),
        np.zeros((24, 4, 4, 3), np.uint8),
        np.arange(24) % 2,
        groups=None if known is None else np.asarray(known),
    )

    outputs: Any = PlannedOutputs(maps)
    groups = group_by_features(outputs, images).groups
    same = {
        (one, other)
        for one in range(24)
        for other in range(one)
        if groups[one] == groups[other]
    }

    assert same == ({(20, 3)} if known is None else {(20, 3), (3, 0), (20, 0)})
