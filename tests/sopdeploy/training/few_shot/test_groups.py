"""Copies by the features of a network: changed, turned and cropped ones beside different images."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from sopdeploy.photos.photo import ArrayImages
from sopdeploy.training.few_shot.default_network import (
    has_default_weights,
    open_default_network,
)
from sopdeploy.training.few_shot.groups import group_by_features
from tests.sopdeploy.photos.test_copies import encoded, scene

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
