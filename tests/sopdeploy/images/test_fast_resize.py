"""Resizing with fast_image_resize gives the pixels of Pillow, but for a few levels, on every processor."""

import importlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.images import fast_resize as module
from sopdeploy.images.fast_resize import (
    FILTERS,
    MAX_LEVELS,
    MAX_MEAN_LEVELS,
    PILLOW_FILTERS,
    fast_resize,
)

cykooz_resizer = pytest.importorskip("cykooz_resizer")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw a smooth image, saved as a JPEG."""
    random = np.random.default_rng(seed)
    cells = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    drawn = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    drawn.save(file, "JPEG")
    return Image.open(file).convert("RGB")


# Size, new size, box
CASES = {
    "a usual photo": ((500, 375), (299, 224), (0, 0, 500, 375)),
    "a part": ((500, 375), (224, 224), (62.5, 0, 437.5, 375)),
    "a part between pixels": ((333, 251), (64, 48), (10.3, 7.25, 301.7, 249.9)),
    "enlarged": ((90, 70), (224, 180), (0, 0, 90, 70)),
    "a strip": ((3, 700), (224, 32), (0, 300.5, 3, 311)),
    "in several blocks of memory": ((4032, 3024), (224, 168), (0, 0, 4032, 3024)),
    "one pixel": ((1, 1), (5, 7), (0, 0, 1, 1)),
}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "new_size", "box"), CASES.values(), ids=CASES)
def test_the_pixels_are_those_of_pillow_but_for_a_few_levels(
    interpolation: str, size: tuple[int, int], new_size: tuple[int, int], box: module.Box
) -> None:
    image = photograph(*size)
    resized = fast_resize(image, new_size, interpolation, box)
    expected = image.resize(new_size, PILLOW_FILTERS[interpolation], box)

    difference = np.abs(np.asarray(resized).astype(int) - np.asarray(expected))
    assert resized.size == new_size
    assert difference.max() <= MAX_LEVELS[interpolation]
    assert difference.mean() <= MAX_MEAN_LEVELS


@pytest.mark.parametrize("interpolation", FILTERS)
def test_boxes_that_begin_at_the_center_of_a_pixel_can_be_enlarged(interpolation: str) -> None:
    image = photograph(338, 194)
    for offset in (0.0, 1e-5, -1e-5, 1e-3):
        for ratio in (0.25, 0.76, 0.99, 1.0, 1.004, 1.3):
            width = 224 * ratio
            left = 20.5 + offset - ratio / 2  # the first pixel is resized from the 20th
            box = (left, 12.125, left + width, 181.875)
            resized = fast_resize(image, (224, 224), interpolation, box)
            expected = image.resize((224, 224), PILLOW_FILTERS[interpolation], box)
            difference = np.abs(np.asarray(resized).astype(int) - np.asarray(expected))
            assert difference.max() <= MAX_LEVELS[interpolation]


@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_processor_gives_the_same_bits(
    interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(500, 375)
    resizer = cykooz_resizer.Resizer()
    monkeypatch.setattr(cykooz_resizer, "Resizer", lambda: resizer)
    results = []
    for extension in cykooz_resizer.CpuExtensions:
        resizer.cpu_extensions = extension
        resized = fast_resize(image, (224, 224), interpolation, (62.5, 0.0, 437.5, 375.0))
        results.append(resized.tobytes())

    assert len(results) >= 3
    assert len({*results}) == 1


def test_pillow_resizes_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(50, 40)
    monkeypatch.setattr(module, "cykooz_resizer", None)
    resized = fast_resize(image, (20, 16), "bicubic", (0.0, 0.0, 50.0, 40.0))

    assert resized == image.resize((20, 16), Image.Resampling.BICUBIC)


class Panic(BaseException):
    """Not an `Exception`, like the panics of Rust."""


def leave_black(*_: Any) -> None:
    pass


def swap_colors(image: Image.Image, resized: Image.Image, _: Any) -> None:
    resized.paste(Image.merge("RGB", image.resize(resized.size).split()[::-1]))


def fail(error: BaseException) -> Any:
    def resize(*_: Any) -> None:
        raise error

    return resize


RESIZERS = {
    "its own": (None, True),
    "no pixels": (leave_black, False),
    "other colors": (swap_colors, False),
    "an error": (fail(ValueError("invalid digit found in string")), False),
    "a panic": (fail(Panic("index out of bounds")), False),
}


@pytest.mark.parametrize("case", RESIZERS)
def test_a_package_that_gives_other_pixels_than_pillow_when_it_is_imported_is_not_used(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, is_used = RESIZERS[case]
    if resize is not None:
        monkeypatch.setattr(
            cykooz_resizer.Resizer, "resize_pil", lambda _, *given: resize(*given)
        )
    try:
        assert (importlib.reload(module).cykooz_resizer is not None) == is_used
        image = photograph(50, 40)
        box = (0.0, 0.0, 50.0, 40.0)
        resized = module.fast_resize(image, (20, 16), "bilinear", box)
        expected = image.resize((20, 16), Image.Resampling.BILINEAR)
        assert (resized == expected) == (not is_used)
    finally:
        monkeypatch.undo()
        importlib.reload(module)


def test_an_interrupt_during_the_test_of_the_package_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cykooz_resizer.Resizer, "resize_pil", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        module.resizes_as_pillow()
