"""Images compared as copies: turned ones, plain ones, and parts on white beside the other pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.photos.copies import find_near_duplicates, find_turned, shrink
from sopdeploy.photos.crops import compare_pixels
from tests.sopdeploy.photos.test_copies import pairs_of, scene


def test_plain_images_are_no_copies_of_each_other():
    plain = [np.full((32, 32, 3), level, np.uint8) for level in (0, 90, 91, 255)]
    scenes = [np.asarray(scene(seed).resize((32, 32))) for seed in range(6)]
    small = np.stack([shrink(Image.fromarray(one)) for one in (*plain, *scenes)])
    assert not find_turned(small).pairs.size


def test_turned_parts_on_white_are_compared_together_with_the_other_pairs(
    monkeypatch: pytest.MonkeyPatch,
):
    small = np.full((12, 64, 64), 255, np.uint8)
    random = np.random.default_rng(0)

    for image in small:
        image[24:40, 8:56] = random.integers(0, 255, (4, 6)).repeat(4, axis=0).repeat(8, axis=1)

    small[7] = np.rot90(small[3])
    small[9] = small[5, ::-1]
    calls = []

    def compare(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
        calls.append(pairs)
        return compare_pixels(small, pairs)

    monkeypatch.setattr("sopdeploy.photos.copies.compare_new", compare)
    views = random.normal(size=(12, 1, 64))
    found = find_near_duplicates([views], small, np.zeros(12, int), list(map(str, range(12))))

    assert pairs_of(found) == [[3, 7], [5, 9]]
    assert len(calls) == 1
