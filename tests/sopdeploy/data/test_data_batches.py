"""Splits, preprocessed data sets, and the order and content of batches."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.data.augment import AugmentedDataset, PadCrop, RandAugment
from sopdeploy.data.base import ArrayImages, PreprocessedDataset, derive_seed, hold_out
from sopdeploy.data.batches import balanced_batches, load_batches, sequential_batches, shuffled_batches
from sopdeploy.data.sources import DigitsConfig, open_data
from sopdeploy.errors import DataError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess

CLASSES = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(targets=CLASSES, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_class_of_two_or_more_is_in_both_parts_of_a_split(targets, fraction, seed) -> None:
    held = hold_out([str(i) for i in range(len(targets))], np.asarray(targets), fraction, seed)
    for target, count in enumerate(np.bincount(targets)):
        out = sum(h for h, t in zip(held, targets, strict=True) if t == target)
        if count > 1:
            assert 1 <= out < count
            assert abs(out - fraction * count) <= 1


def test_a_seed_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive_seed(0, "order", 1) == 4739946833832999988
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("\udcff") >= 0  # a file name that is no UTF-8


def test_one_fifth_of_the_digits_of_every_class_is_held_out_and_preprocessed() -> None:
    split = open_data(DigitsConfig(kind="digits"))
    assert (len(split.train), len(split.held_out)) == (1438, 359)
    assert split.train.labels == split.held_out.labels == tuple("0123456789")
    held = np.bincount([split.held_out[i][1] for i in range(359)])
    assert 35 <= held.min() <= held.max() <= 37
    for resize, crop in ((16, 16), (32, 32), (9, 8)):
        rules = Preprocess(resize=resize, crop=crop)
        prepared = PreprocessedDataset(split.held_out, rules)
        array, label = prepared[7]
        image, expected = split.held_out[7]
        assert (array.dtype, array.shape, label) == (np.uint8, (crop, crop, 3), expected)
        assert np.array_equal(array, preprocess_image(image, rules))
        assert (len(prepared), prepared.labels) == (359, split.held_out.labels)


@given(st.integers(1, 2000), st.integers(2, 300), st.integers(0, 2**40), st.integers(0, 99))
def test_an_epoch_is_a_permutation_in_batches_of_nearly_equal_size(samples, size, seed, epoch) -> None:
    batches = shuffled_batches(samples, size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= max(size, 3)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or samples == 1
    assert shuffled_batches(samples, size, seed, epoch) == batches


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [shuffled_batches(50, 50, seed, epoch)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


@given(COUNTS, st.integers(2, 40), st.integers(0, 5))
def test_a_balanced_epoch_uses_every_class_equally_often(counts, size, epoch) -> None:
    targets = np.repeat(np.arange(len(counts)), counts)
    batches = balanced_batches(targets, size, 3, epoch)
    assert batches == balanced_batches(targets, size, 3, epoch)
    positions = np.concatenate([np.asarray(part) for part in batches])
    assert len(positions) == len(set(positions.tolist())) == len(targets)
    assert max(map(len, batches)) <= max(size, 3)
    assert min(map(len, batches)) > 1 or len(targets) == 1
    samples = positions % len(targets)
    shown = [int((targets[samples] == target).sum()) for target, count in enumerate(counts) if count]
    assert max(shown) - min(shown) <= 1
    for target in range(len(counts)):
        showings = np.bincount(samples[targets[samples] == target], minlength=len(targets))
        own = showings[targets == target]
        assert own.size == 0 or own.max() - own.min() <= 1


@pytest.mark.parametrize("make", [shuffled_batches, balanced_batches])
def test_batches_do_not_depend_on_the_number_of_workers(make) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    images, augmentation = (
        ArrayImages(("a", "b"), pixels, np.arange(30) % 2),
        PadCrop(kind="pad-crop", flip=0.5),
    )
    rand_augment = RandAugment(ops=1, magnitude=20, erase=0.5)
    view = AugmentedDataset(images, augmentation, Preprocess(resize=12, crop=12), 0, 0, rand_augment)
    batches = make(30 if make is shuffled_batches else images.targets, 8, 0, 0)
    alone, shared = (list(load_batches(view, batches, workers, torch.device("cpu"))) for workers in (0, 2))
    assert len(alone) == len(shared) == 4
    for (left, a), (right, b) in zip(alone, shared, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(a, b)
        assert left.dtype == torch.uint8
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_also_from_a_worker(workers) -> None:
    class Spoilt(list):
        def __getitem__(self, index: int):
            if index == 5:
                raise DataError("a/5.jpg: cannot be read; repair or delete it")
            return np.zeros((4, 4, 3), dtype=np.uint8), 0

    with pytest.raises(DataError) as problem:
        list(load_batches(Spoilt(range(8)), sequential_batches(8, 2), workers, torch.device("cpu")))
    assert str(problem.value) == "a/5.jpg: cannot be read; repair or delete it"
