"""The share of equal tiles of photographs, by their pixels."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from sopdeploy.photos.copies import shrink
from sopdeploy.photos.crops import MOSTLY, compare_pixels
from tests.sopdeploy.photos.test_copies import scene

NUM_SCENES = 12
CROPS = {"half": (20, 25, 132, 109), "85 %": (4, 12, 140, 114), "a corner": (48, 36, 160, 120)}


def pairs_of(count: int) -> np.ndarray:
    """List all pairs of different images, each once."""
    return np.stack(np.triu_indices(count, 1))


def alike(seed: int, share: float = 0.6) -> Image.Image:
    """Paint a scene of which only a *share* is its own; the rest is the same in all."""
    return Image.blend(scene(1000), scene(seed), share)


def equal_pairs(small: np.ndarray, pairs: np.ndarray) -> list[list[int]]:
    """List the *pairs* with a share of equal tiles as copies have it."""
    return sorted(
        sorted(pair) for pair in pairs[:, compare_pixels(small, pairs) >= MOSTLY].T.tolist()
    )


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("box", CROPS.values(), ids=CROPS)
def test_a_part_of_a_photograph_is_found_among_photographs_that_look_alike(
    box: tuple[int, int, int, int], *, is_first: bool
):
    scenes = [alike(seed) for seed in range(NUM_SCENES)]
    crop = ImageEnhance.Brightness(scenes[3].crop(box).resize((70, 52))).enhance(0.85)
    small = np.stack([shrink(image) for image in (*scenes, crop)])
    pairs = pairs_of(NUM_SCENES + 1)
    assert equal_pairs(small, pairs[::-1] if is_first else pairs) == [[3, NUM_SCENES]]


def test_a_third_of_a_photograph_is_found_although_it_is_sharper():
    boxes = [(32, 24, 128, 96), (10, 8, 106, 80), (60, 40, 156, 112)]
    scenes = [scene(seed) for seed in range(6)]
    parts = [image.crop(box) for image in scenes for box in boxes]
    small = np.stack([shrink(image) for image in (*scenes, *parts)])
    of_part = np.arange(len(parts)) // len(boxes)
    shares = compare_pixels(small, np.stack([of_part, np.arange(len(parts)) + len(scenes)]))
    assert shares.min() >= MOSTLY


def test_the_number_of_pairs_that_are_compared_at_once_changes_no_share(
    monkeypatch: pytest.MonkeyPatch,
):
    crops = [alike(0).crop((number, 0, 160, 120)) for number in range(6)]  # of one photograph
    small = np.stack(
        [shrink(image) for image in (*crops, *(alike(seed) for seed in range(1, 7)))]
    )
    found = compare_pixels(small, pairs_of(NUM_SCENES))

    assert (found >= MOSTLY).sum() == 15
    monkeypatch.setattr("sopdeploy.photos.crops._BLOCK", 7)
    assert np.allclose(compare_pixels(small, pairs_of(NUM_SCENES)), found, atol=0.02)


def test_photographs_that_look_alike_are_no_copies_of_each_other():
    small = np.stack([shrink(alike(seed)) for seed in range(NUM_SCENES)])
    assert not equal_pairs(small, pairs_of(NUM_SCENES))


def test_noise_and_plain_images_are_no_copies_of_each_other():
    noise = np.random.default_rng(0).integers(0, 256, (NUM_SCENES, 64, 64), np.uint8)
    plain = np.full((4, 64, 64), np.asarray([0, 90, 91, 255])[:, None, None], np.uint8)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) // 8, (1, 64, 64))
    small = np.concatenate([noise, plain, ramp])
    assert not equal_pairs(small, pairs_of(len(small)))


def cut_out(rings: list[int], size: int = 160) -> Image.Image:
    """Draw a part on white, with wires and rings of these gray levels, which fills half of the frame."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.line((0, 80, 160, 80), fill=(150, 150, 150), width=5)
    for row in range(50, 110):
        draw.line((25, row, 135, row), fill=(290 - 2 * row, 250 - 2 * row, 220 - 2 * row))
    for number, level in enumerate(rings):
        left = 40 + 22 * number
        draw.rectangle((left, 51, left + 9, 109), fill=(level, level // 2, level))
    return image


CUT_OUT_COPIES = {
    "smaller": lambda image: image.resize((90, 90)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "turned": lambda image: image.rotate(15, fillcolor="white"),
    "squashed": lambda image: image.resize((160, 130)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((8, 8, 152, 152)),
}


def test_parts_of_one_shape_on_white_are_no_copies_of_each_other():
    rings = [[250, 30, 250, 30], [30, 250, 250, 30], [30, 30, 30, 250], [250, 250, 30, 250]]
    small = np.stack([shrink(cut_out(levels)) for levels in rings])

    assert equal_pairs(small, pairs_of(len(rings))) == []


@pytest.mark.parametrize("change", CUT_OUT_COPIES.values(), ids=CUT_OUT_COPIES)
def test_a_copy_of_a_part_on_white_is_found(change):
    image = cut_out([250, 30, 250, 30])
    small = np.stack([shrink(image), shrink(change(image))])

    assert equal_pairs(small, pairs_of(2)) == [[0, 1]]
