"""Comparisons of pixels that are kept between runs: the same shares, computed once."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.files import features_folder
from sopdeploy.photos import compared
from sopdeploy.photos.compared import compare_new
from sopdeploy.photos.crops import compare_pixels
from tests.sopdeploy.photos.test_copies import CHANGES, compare, pairs_of, scene

PAIRS = np.asarray([[0, 0, 1, 2], [1, 2, 3, 3]])


@pytest.fixture
def small() -> NDArray[np.uint8]:
    """Four images, of which two are nearly equal."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
    images[1] = np.clip(images[0] + rng.integers(-3, 4, (64, 64)), 0, 255)
    return images.astype(np.uint8)


@pytest.fixture
def num_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of pairs of each comparison, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts: list[int] = []

    def count(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
        counts.append(pairs.shape[1])
        return compare_pixels(small, pairs)

    monkeypatch.setattr(compared, "compare_pixels", count)
    return counts


def kept() -> Path:
    (file,) = features_folder().glob("*.pairs")
    return file


def test_pairs_that_a_run_has_compared_are_not_compared_again(
    small: NDArray[np.uint8], num_compared: list[int]
) -> None:
    expected = compare_pixels(small, PAIRS)
    assert expected[0] > 0.9

    assert np.array_equal(compare_new(small, PAIRS[:, :2]), expected[:2])
    assert np.array_equal(compare_new(small, PAIRS), expected)
    assert np.array_equal(compare_new(small[[1, 0, 3]], np.asarray([[1], [0]])), expected[:1])
    assert num_compared == [2, 2]


def test_a_changed_image_is_compared_again(
    small: NDArray[np.uint8], num_compared: list[int]
) -> None:
    compare_new(small, PAIRS)
    small[3] = 255 - small[3]

    assert np.array_equal(compare_new(small, PAIRS), compare_pixels(small, PAIRS))
    assert num_compared == [4, 2]


@pytest.mark.parametrize("damage", [b"", b"abc", b"\0" * 4 + b"x" * 24])
def test_a_damaged_file_is_written_anew(
    damage: bytes, small: NDArray[np.uint8], num_compared: list[int]
) -> None:
    expected = compare_new(small, PAIRS)
    whole = kept().read_bytes()
    kept().write_bytes(damage)

    assert np.array_equal(compare_new(small, PAIRS), expected)
    assert num_compared == [4, 4]
    assert kept().read_bytes() == whole


def test_pairs_of_this_run_stay_where_there_are_too_many(
    small: NDArray[np.uint8],
    num_compared: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compared, "MAX_PAIRS", 2)
    compare_new(small, PAIRS[:, :2])
    compare_new(small, PAIRS[:, 2:])
    compare_new(small, PAIRS[:, 2:])

    assert num_compared == [2, 2]


def test_without_a_cache_folder_all_pairs_are_compared(
    small: NDArray[np.uint8],
    num_compared: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compare_new(small, PAIRS)
    compare_new(small, PAIRS)

    assert num_compared == [4, 4]


def test_candidates_are_the_same_however_many_images_are_compared_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    images, found = [scene(number) for number in range(20)] + [CHANGES["darker"](scene(4))], []
    for cosines in (21 * 21, 21 * 5, 1):
        monkeypatch.setattr("sopdeploy.photos.copies._COSINES", cosines)
        found.append(pairs_of(compare(images, [0] * 21)))
    assert found == [[[4, 20]]] * 3
