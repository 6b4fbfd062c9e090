"""Augmentation: functions of seed, epoch and sample, whatever the image, the order and the workers."""

from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.data.augment import (
    Augmentation,
    AugmentedDataset,
    CenterCrop,
    ColorConfig,
    PadCrop,
    RandomResizedCrop,
    RandomSide,
)
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.timm_augment import RandAugment
from sopdeploy.images.preprocess import Preprocess

RULES = Preprocess(resize=18, crop=16)
CROPS = [
    CenterCrop(kind="center", flip=0.5),
    PadCrop(kind="pad-crop", flip=0.5, pad=2),
    RandomResizedCrop(kind="random-resized-crop", flip=0.5),
    RandomSide(kind="random-side", flip=0.5, sides=(16, 40)),
]
# What is random of an image: a crop, or one of the other changes alone.
STILL = {"augmentation": CenterCrop(kind="center", flip=0.0)}
CHANGES = {
    **{crop.kind: {"augmentation": crop} for crop in CROPS},
    "color": STILL | {"color": ColorConfig(lighting=0.5)},
    "rand augment": STILL | {"rand_augment": RandAugment(num_ops=8)},
}
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def images(count: int = 12) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 30, 20, 3), dtype=np.uint8)
    return ArrayImages(("a", "b"), pixels, np.arange(count) % 2)


def test_every_augmentation_is_tested() -> None:
    union, _ = get_args(Augmentation)
    assert {type(crop) for crop in CROPS} == set(get_args(union))


@pytest.mark.parametrize("change", CHANGES)
def test_augmentation_depends_on_seed_epoch_and_sample_only(change) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def arrays(seed: int, epoch: int, order=range(12)) -> np.ndarray:
        view = AugmentedDataset(
            images(), preprocess=RULES, seed=seed, epoch=epoch, **CHANGES[change]
        )
        return view.pixels(order)

    first = arrays(1, 2)
    assert first.dtype == np.uint8
    assert first.shape == (12, 16, 16, 3)
    assert np.array_equal(arrays(1, 2, range(11, -1, -1))[::-1], first)
    for seed, epoch in ((1, 3), (2, 2)):
        assert not np.array_equal(arrays(seed, epoch), first)
    repeated = arrays(1, 2, range(12, 24))
    assert not np.array_equal(repeated, first), (
        "the second use of a sample is augmented differently"
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (700, 3), (31, 40)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("augmentation", CROPS, ids=lambda augmentation: augmentation.kind)
def test_images_of_any_size_and_mode_are_augmented(augmentation, mode, size) -> None:
    class One(ArrayImages):
        def open(self, index: int) -> Image.Image:
            return Image.new(mode, size)

    one = One(("a",), np.zeros((1, 1, 1), np.uint8), np.zeros(1, np.int64))
    pixels = AugmentedDataset(one, augmentation, RULES, 0, 0).pixels([0])
    assert pixels.shape == (1, 16, 16, 3)


def test_a_padded_crop_uses_every_shift_and_black_padding() -> None:
    white = ArrayImages(("a",), np.full((1, 4, 4, 3), 255, np.uint8), np.zeros(1, np.int64))
    view = AugmentedDataset(
        white, PadCrop(kind="pad-crop", pad=1), Preprocess(resize=4, crop=4), 0, 0
    )
    seen = {array.tobytes() for array in view.pixels(range(300))}

    assert len(seen) == 9
    assert {value for array in seen for value in array} == {0, 255}


@given(size=SIZES, seed=st.integers(0, 2**63))
def test_a_random_resized_box_is_inside_the_image_with_an_allowed_area(size, seed) -> None:
    augmentation = RandomResizedCrop(kind="random-resized-crop", scale=(0.08, 1.0))
    left, top, right, bottom = augmentation.box(size, 224, Random(seed))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]

    if min(size) > 50 and max(size) < 2 * min(size):
        assert (right - left) * (bottom - top) >= 0.07 * size[0] * size[1]
        assert 0.7 < (right - left) / (bottom - top) < 1.4


@given(size=SIZES, crop=st.integers(1, 300), seed=st.integers(0, 2**63))
def test_a_random_side_box_is_square_and_inside_the_image(size, crop, seed) -> None:
    left, top, right, bottom = RandomSide(kind="random-side").box(size, crop, Random(seed))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]

    share = (right - left) / min(size)
    assert min(1.0, crop / 512) - 1e-6 <= share <= min(1.0, crop / 256) + 1e-6
