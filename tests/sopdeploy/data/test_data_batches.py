import multiprocessing
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.data.augment import AugmentedDataset, PadCrop
from sopdeploy.data.base import ArrayImages
from sopdeploy.data.batches import load_batches, sequential_batches, shuffled_batches
from sopdeploy.errors import DataError
from sopdeploy.images.preprocess import Preprocess

CPU = torch.device("cpu")


@given(
    samples=st.integers(1, 2000),
    size=st.integers(2, 300),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 99),
)
def test_an_epoch_is_a_permutation_in_batches_of_nearly_equal_size(samples, size, seed, epoch) -> None:
    batches = shuffled_batches(samples, size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert shuffled_batches(samples, size, seed, epoch) == batches


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [shuffled_batches(50, 50, seed, epoch)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@given(samples=st.integers(0, 500), size=st.integers(1, 70))
def test_sequential_batches_keep_the_order(samples, size) -> None:
    batches = sequential_batches(samples, size)
    assert [index for batch in batches for index in batch] == list(range(samples))
    assert all(len(batch) == size for batch in batches[:-1])


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    images = ArrayImages(("a", "b"), images, np.arange(30) % 2)
    view = AugmentedDataset(images, PadCrop(kind="pad-crop", flip=0.5), Preprocess(resize=12, crop=12), 0, 0)
    alone, shared = (
        list(load_batches(view, shuffled_batches(30, 8, 0, 0), workers, CPU)) for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 4
    for (left, a), (right, b) in zip(alone, shared, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(a, b)
        assert left.dtype == torch.uint8
    assert not multiprocessing.active_children()


@dataclass
class Spoilt:
    labels = ("a",)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        if index == 5:
            raise DataError("a/5.jpg: cannot be read; repair or delete it")
        return np.zeros((4, 4, 3), dtype=np.uint8), 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_also_from_a_worker(workers) -> None:
    with pytest.raises(DataError) as problem:
        list(load_batches(Spoilt(), sequential_batches(8, 2), workers, CPU))
    assert str(problem.value) == "a/5.jpg: cannot be read; repair or delete it"
