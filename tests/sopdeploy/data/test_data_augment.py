from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from sopdeploy.data.augment import (
    Augmentation,
    AugmentedDataset,
    CenterCrop,
    PadCrop,
    RandomResizedCrop,
    RandomSide,
)
from sopdeploy.data.base import ArrayImages
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.images.preprocess import Preprocess

RULES = Preprocess(resize=18, crop=16)
AUGMENTATIONS = [
    CenterCrop(kind="center", flip=0.5),
    PadCrop(kind="pad-crop", flip=0.5, pad=2),
    RandomResizedCrop(kind="random-resized-crop", flip=0.5),
    RandomSide(kind="random-side", flip=0.5, sides=(16, 40)),
]
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def images(count: int = 12) -> ArrayImages:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 30, 20, 3), dtype=np.uint8)
    return ArrayImages(("a", "b"), images, np.arange(count) % 2)


def arrays(augmentation, seed: int, epoch: int) -> np.ndarray:
    view = AugmentedDataset(images(), augmentation, RULES, seed, epoch)
    assert view.labels == ("a", "b")
    return np.stack([view[index][0] for index in range(len(view))])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: augmentation.kind)
def test_augmentation_depends_on_seed_epoch_and_sample_only(augmentation) -> None:
    first = arrays(augmentation, seed=1, epoch=2)
    view = AugmentedDataset(images(), augmentation, RULES, 1, 2)
    assert np.array_equal(np.stack([view[i][0] for i in reversed(range(12))])[::-1], first)
    assert not np.array_equal(arrays(augmentation, seed=1, epoch=3), first)
    assert not np.array_equal(arrays(augmentation, seed=2, epoch=2), first)
    assert first.dtype == np.uint8
    assert first.shape == (12, 16, 16, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 3), (16, 16), (31, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: augmentation.kind)
def test_images_of_any_size_and_mode_are_augmented(augmentation, mode, size) -> None:
    class One:
        labels = ("a",)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            return Image.new(mode, size), 0

    array, _ = AugmentedDataset(One(), augmentation, RULES, 0, 0)[0]
    assert array.shape == (16, 16, 3)


def test_a_center_crop_without_mirroring_equals_preprocessing() -> None:
    view = AugmentedDataset(images(), CenterCrop(kind="center"), RULES, 0, 0)
    assert all(np.array_equal(view[i][0], RULES(images()[i][0])) for i in range(12))


def test_about_half_of_the_images_are_mirrored() -> None:
    many = images(400)
    view = AugmentedDataset(many, CenterCrop(kind="center", flip=0.5), RULES, 0, 0)
    mirrored = sum(np.array_equal(view[i][0], RULES(many[i][0])[:, ::-1]) for i in range(400))
    assert 160 < mirrored < 240


def test_a_padded_crop_uses_every_shift_and_black_padding() -> None:
    rules, augmentation = Preprocess(resize=4, crop=4), PadCrop(kind="pad-crop", pad=1)
    white = Image.new("RGB", (4, 4), "white")
    seen = {augmentation.crop(white, rules, Random(seed)).tobytes() for seed in range(300)}
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


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned by EXIF"])
@pytest.mark.parametrize("kind", ["random-resized-crop", "random-side"])
def test_a_draft_shows_the_same_part_a_few_gray_levels_off(tmp_path, kind, turned) -> None:
    y, x = np.mgrid[0:400, 0:600] / 600
    pixels = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 5 * y))], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.jpg", quality=95, exif=exif)
    images = open_classes(tmp_path, ("a", "b"))
    rules = Preprocess(resize=72, crop=64)
    augmentation = {"kind": kind, "flip": 0.5} | ({"sides": (66, 100)} if kind == "random-side" else {})
    full, draft = (
        [
            AugmentedDataset(
                images, TypeAdapter(Augmentation).validate_python(augmentation | switch), rules, 0, epoch
            )[0]
            for epoch in range(12)
        ]
        for switch in ({}, {"draft": True})
    )
    gaps = [np.abs(one[0].astype(int) - other[0].astype(int)) for one, other in zip(full, draft, strict=True)]
    assert max(gap.mean() for gap in gaps) < 2
    assert any(gap.any() for gap in gaps)
