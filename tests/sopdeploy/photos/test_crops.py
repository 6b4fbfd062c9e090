"""Crops of photographs that look alike, by their pixels."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sopdeploy.photos.copies import CANDIDATES, find_pairs, shrink
from sopdeploy.photos.crops import ALIGNED, find_crops
from tests.sopdeploy.photos.test_copies import scene

NUM_SCENES = 12
CLASSES = np.arange(NUM_SCENES) % 2
CROPS = {"half": (20, 25, 132, 109), "85 %": (4, 12, 140, 114), "a corner": (48, 36, 160, 120)}


def pairs_of(count: int) -> np.ndarray:
    """List all pairs of different images."""
    first, second = np.indices((count, count)).reshape(2, -1)
    return np.stack([first, second])[:, first != second]


def alike(seed: int, share: float = 0.6) -> Image.Image:
    """Paint a scene of which only a *share* is its own; the rest is the same in all."""
    return Image.blend(scene(1000), scene(seed), share)


def small_images(images: list[Image.Image]) -> np.ndarray:
    """Shrink *images* as `train` keeps them."""
    return np.stack([shrink(np.asarray(image.resize((96, 96)))) for image in images])


@pytest.mark.parametrize("box", CROPS.values(), ids=CROPS)
def test_a_part_of_a_photograph_is_found_among_photographs_that_look_alike(box: tuple[int, int, int, int]):
    scenes = [alike(seed) for seed in range(NUM_SCENES)]
    crop = ImageEnhance.Brightness(scenes[3].crop(box).resize((70, 52))).enhance(0.85)
    small, classes = small_images([*scenes, crop]), np.asarray([*CLASSES, 1])
    assert find_crops(small, pairs_of(NUM_SCENES + 1), classes).T.tolist() == [[3, NUM_SCENES]]


def test_the_number_of_pairs_that_are_compared_at_once_changes_no_pair(monkeypatch: pytest.MonkeyPatch):
    crops = [alike(0).crop((number, 0, 160, 120)) for number in range(6)]  # of one photograph
    small, pairs = small_images([*crops, *(alike(seed) for seed in range(1, 7))]), pairs_of(NUM_SCENES)
    found = find_crops(small, pairs, CLASSES)
    assert found.size
    assert np.bincount(found[1]).max() <= ALIGNED
    monkeypatch.setattr("sopdeploy.photos.crops._BLOCK", 7)
    assert sorted(find_crops(small, pairs, CLASSES).T.tolist()) == sorted(found.T.tolist())


def test_photographs_that_look_alike_are_no_crops_of_each_other():
    small = small_images([alike(seed) for seed in range(NUM_SCENES)])
    assert not find_crops(small, pairs_of(NUM_SCENES), CLASSES).size


def test_images_that_correlate_nowhere_are_no_crops_of_each_other():
    noise = np.random.default_rng(0).integers(0, 256, (NUM_SCENES, 64, 64), np.uint8)
    assert find_crops(noise, pairs_of(NUM_SCENES), CLASSES).shape == (2, 0)


def test_small_objects_before_one_background_are_no_crops_of_each_other():
    images = [scene(0) for _ in range(NUM_SCENES)]
    for number, image in enumerate(images):
        image.paste((250, 10, 10), (70 + number, 50, 74 + number, 53))
    assert not find_crops(small_images(images), pairs_of(NUM_SCENES), CLASSES).size


@pytest.mark.parametrize(("noise", "num_candidates"), [(0.4, 0), (8.0, 80 * CANDIDATES)])
def test_pixels_are_compared_only_where_the_vectors_miss_copies(noise: float, num_candidates: int):
    random = np.random.default_rng(0)
    vectors, originals = random.normal(size=(80, 64)), np.arange(16)
    copies = vectors[originals] + noise * random.normal(size=(16, 64))
    found = find_pairs([vectors[:, None]], [copies], originals, np.arange(80) % 4, range(80))
    assert found.candidates.shape == (2, num_candidates)
    assert (found.candidates[0] != found.candidates[1]).all()
