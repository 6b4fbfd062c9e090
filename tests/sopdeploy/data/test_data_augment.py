"""Augmentation: functions of seed, epoch and sample, whatever the image, the order and the workers."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from sopdeploy.data.augment import (
    Augmentation,
    AugmentedDataset,
    CenterCrop,
    Mixup,
    PadCrop,
    RandAugment,
    RandomResizedCrop,
    RandomSide,
)
from sopdeploy.data.base import ArrayImages
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.step.losses import training_loss

RULES = Preprocess(resize=18, crop=16)
CENTER = CenterCrop(kind="center")
CROPS = [
    CenterCrop(kind="center", flip=0.5),
    PadCrop(kind="pad-crop", flip=0.5, pad=2),
    RandomResizedCrop(kind="random-resized-crop", flip=0.5),
    RandomSide(kind="random-side", flip=0.5, sides=(16, 40)),
]
RAND_AUGMENTS = [RandAugment(ops=2), RandAugment(erase=1.0), RandAugment(ops=1, magnitude=20, erase=0.5)]
MIXUPS = [Mixup(mixup=0.4), Mixup(cutmix=1.0), Mixup(mixup=0.4, cutmix=1.0)]
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def images(count: int = 12) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 30, 20, 3), dtype=np.uint8)
    return ArrayImages(("a", "b"), pixels, np.arange(count) % 2)


@pytest.mark.parametrize(
    ("crop", "rand_augment"),
    [*((crop, RandAugment()) for crop in CROPS), *((CENTER, way) for way in RAND_AUGMENTS)],
    ids=str,
)
def test_augmentation_depends_on_seed_epoch_and_sample_only(crop, rand_augment) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def arrays(seed: int, epoch: int, order=range(12)) -> np.ndarray:
        view = AugmentedDataset(images(), crop, RULES, seed, epoch, rand_augment)
        assert view.labels == ("a", "b")
        return np.stack([view[index][0] for index in order])

    first = arrays(1, 2)
    assert (first.dtype, first.shape) == (np.uint8, (12, 16, 16, 3))
    assert np.array_equal(arrays(1, 2, range(11, -1, -1))[::-1], first)
    for seed, epoch in ((1, 3), (2, 2)):
        assert not np.array_equal(arrays(seed, epoch), first)
    repeated = arrays(1, 2, range(12, 24))
    assert not np.array_equal(repeated, first), "the second use of a sample is augmented differently"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (700, 3), (31, 40)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("augmentation", CROPS, ids=lambda augmentation: augmentation.kind)
def test_images_of_any_size_and_mode_are_augmented(augmentation, mode, size) -> None:
    class One(list):
        labels = ("a",)

    array, _ = AugmentedDataset(One([(Image.new(mode, size), 0)]), augmentation, RULES, 0, 0)[0]
    assert array.shape == (16, 16, 3)


def test_about_half_of_the_center_crops_are_mirrored() -> None:
    many = images(400)
    plain, flipped = (
        [view[index][0] for index in range(400)]
        for view in (AugmentedDataset(many, augmentation, RULES, 0, 0) for augmentation in (CENTER, CROPS[0]))
    )
    assert all(np.array_equal(plain[i], preprocess_image(many[i][0], RULES)) for i in range(12))
    mirrored = sum(np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, plain, strict=True))
    assert 160 < mirrored < 240


def test_a_padded_crop_uses_every_shift_and_black_padding() -> None:
    white = ArrayImages(("a",), np.full((1, 4, 4, 3), 255, np.uint8), np.zeros(1, np.int64))
    view = AugmentedDataset(white, PadCrop(kind="pad-crop", pad=1), Preprocess(resize=4, crop=4), 0, 0)
    seen = {view[copy][0].tobytes() for copy in range(300)}
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


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "turned by EXIF"])
@pytest.mark.parametrize("kind", ["random-resized-crop", "random-side"])
def test_a_draft_shows_the_same_part_a_few_gray_levels_off(tmp_path, kind, orientation) -> None:
    y, x = np.mgrid[0:400, 0:600] / 600
    pixels = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 5 * y))], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.jpg", quality=95, exif=exif)
    stored, rules = open_evaluation_images(tmp_path, ("a", "b")), Preprocess(resize=72, crop=64)
    values = {"kind": kind, "flip": 0.5} | ({"sides": (66, 100)} if kind == "random-side" else {})
    plain, draft = (
        TypeAdapter(Augmentation).validate_python(values | {"draft": switch}) for switch in (False, True)
    )
    gaps = []
    for epoch in range(12):
        full, small = (AugmentedDataset(stored, way, rules, 0, epoch)[0][0] for way in (plain, draft))
        gaps.append(np.abs(full.astype(int) - small.astype(int)))
    assert max(gap.mean() for gap in gaps) < 2
    assert any(gap.any() for gap in gaps)


def test_an_erased_box_has_the_mean_color() -> None:
    before, after = (
        AugmentedDataset(images(), CENTER, RULES, 0, 0, way)[3][0]
        for way in (RandAugment(), RAND_AUGMENTS[1])
    )
    changed = (before != after).any(axis=2)
    assert changed.any()
    mean = [round(255 * value) for value in RULES.mean]
    assert all(pixel.tolist() == mean for pixel in after[changed])


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.arange(size) % 3


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("mix", MIXUPS, ids=str)
def test_a_batch_of_any_size_is_mixed_with_soft_labels_by_the_seed_of_the_step(mix, size) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(*batch(size), 3))
    mixed, shares = results[0]
    assert mixed.shape == (size, 3, 8, 8)
    assert shares.shape == (size, 3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(size))
    assert bool(training_loss(torch.randn(size, 3), shares, {"main": 1.0}, 0.1).total.isfinite())
    assert torch.equal(mixed, results[1][0])
    assert size < 3 or not torch.equal(mixed, results[2][0])


def test_mixup_blends_images_and_labels_equally() -> None:
    torch.manual_seed(0)
    pixels, labels = batch(3)
    mixed, shares = Mixup(mixup=1.0)(pixels, labels, 3)
    share = shares[0, 0]
    torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.roll(1, 0))


def test_mixup_and_cutmix_are_both_drawn_if_enabled_and_nothing_if_not() -> None:
    torch.manual_seed(0)
    pixels, labels = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1])
    kinds = set()
    for _ in range(20):
        mixed, _ = Mixup(mixup=1.0, cutmix=1.0)(pixels, labels, 2)
        kinds.add(bool(((mixed == 0) | (mixed == 1)).all()))
    assert kinds == {True, False}
    before = torch.get_rng_state()
    same, classes = Mixup()(pixels, labels, 3)
    assert same is pixels
    assert classes is labels
    assert torch.equal(torch.get_rng_state(), before)
