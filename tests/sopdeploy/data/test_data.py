import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.data.base import PreprocessedDataset, derive_seed, hold_out
from sopdeploy.data.datasets.small import open_digits
from sopdeploy.data.sources import DigitsConfig, open_data
from sopdeploy.images.preprocess import Preprocess

CLASSES = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(targets=CLASSES, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_class_of_two_or_more_is_in_both_parts_of_a_split(targets, fraction, seed) -> None:
    held = hold_out([str(i) for i in range(len(targets))], targets, fraction, seed)
    for target, count in enumerate(np.bincount(targets)):
        out = sum(h for h, t in zip(held, targets, strict=True) if t == target)
        if count > 1:
            assert 1 <= out < count
            assert abs(out - fraction * count) <= 1


def test_a_split_depends_on_the_image_names_not_on_their_order() -> None:
    keys, targets = [f"{i}.jpg" for i in range(40)], [i % 3 for i in range(40)]
    held = dict(zip(keys, hold_out(keys, targets, 0.2, 0), strict=True))
    backwards = hold_out(keys[::-1], targets[::-1], 0.2, 0)
    assert dict(zip(keys[::-1], backwards, strict=True)) == held
    assert hold_out(keys, targets, 0.2, 1) != list(held.values())


def test_a_seed_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive_seed(0, "order", 1) == 4739946833832999988
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("\udcff") >= 0  # a file name that is no UTF-8


def test_one_fifth_of_the_digits_of_every_class_is_held_out() -> None:
    split = open_data(DigitsConfig(kind="digits"))
    assert len(split.train) + len(split.held_out) == 1797
    held = np.bincount([split.held_out[i][1] for i in range(len(split.held_out))])
    assert len(split.held_out) == 359
    assert held.min() >= 35
    assert held.max() <= 37
    assert split.train.labels == split.held_out.labels == tuple("0123456789")


@pytest.mark.parametrize(("resize", "crop"), [(16, 16), (32, 32), (9, 8)])
def test_a_preprocessed_dataset_applies_the_preprocessing(resize, crop) -> None:
    rules = Preprocess(resize=resize, crop=crop)
    images = open_digits().held_out
    prepared = PreprocessedDataset(images, rules)
    array, label = prepared[7]
    assert array.dtype == np.uint8
    assert array.shape == (crop, crop, 3)
    assert np.array_equal(array, rules(images[7][0]))
    assert label == images[7][1]
    assert (len(prepared), prepared.labels) == (len(images), images.labels)
