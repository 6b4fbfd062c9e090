"""Splits, preprocessed data sets, batches, and images that cannot be read."""

import multiprocessing
import multiprocessing.process
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sopdeploy.base.seeds import derive_seed
from sopdeploy.data import batches as data_batches
from sopdeploy.data.augment import AugmentedDataset, ColorConfig, PadCrop
from sopdeploy.data.batches import load_batches, shuffled_batches
from sopdeploy.data.photos import network_inputs
from sopdeploy.data.photos.file_checks import unreadable_images_error
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.photos.split import hold_out
from sopdeploy.data.sources import DigitsConfig, open_data
from sopdeploy.errors import DataError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from tests.support.small_data import jpeg, write_photos

CLASSES = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(targets=CLASSES, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_class_of_two_is_in_both_parts_of_a_split(targets, fraction, seed) -> None:
    held = hold_out([str(i) for i in range(len(targets))], np.asarray(targets), fraction, seed)
    for target, count in enumerate(np.bincount(targets)):
        out = sum(h for h, t in zip(held, targets, strict=True) if t == target)
        if count > 1:
            assert 1 <= out < count
            assert abs(out - fraction * count) <= 1


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 6)),
        elements=st.sampled_from([0.0, 1.0]),
    )
)
def test_images_of_several_classes_leave_a_training_image_of_every_class(targets) -> None:
    held = hold_out([str(i) for i in range(len(targets))], targets, 0.5, 0)

    assert np.array_equal(targets[~held].any(axis=0), targets.any(axis=0))
    assert not held.all()


def test_a_frequent_class_is_not_held_out_by_rare_ones() -> None:
    # Each image has another rare class,
    frequent_and_rare = np.hstack([np.ones((4, 1)), np.eye(4)])
    other = np.hstack([np.zeros((4, 1)), np.eye(4)])  # of which one more image exists
    targets = np.vstack([frequent_and_rare, other]).astype(np.float32)

    for seed in range(50):
        held = hold_out(list("abcdefgh"), targets, 0.5, seed)
        assert targets[~held, 0].any()
        assert held.sum() == 4


def test_a_seed_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive_seed(0, "order", 1) == 4739946833832999988
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("\udcff") >= 0  # a file name that is not UTF-8


def test_one_fifth_of_the_digits_of_every_class_is_held_out() -> None:
    split = open_data(DigitsConfig(kind="digits"))
    assert (len(split.train), len(split.held_out)) == (1438, 359)
    assert split.train.labels == split.held_out.labels == tuple("0123456789")

    held = np.bincount(split.held_out.targets)
    assert 35 <= held.min() <= held.max() <= 37
    for resize, crop in ((16, 16), (32, 32), (9, 8)):
        rules = Preprocess(resize=resize, crop=crop)
        prepared = PreprocessedDataset(split.held_out, rules)
        (array,), (label,) = prepared.batch([7])
        image = split.held_out.photo(7).image
        expected = split.held_out.targets[7]
        assert array.dtype == np.uint8
        assert array.shape == (crop, crop, 3)
        assert label == expected
        assert np.array_equal(array, preprocess_image(image, rules))
        assert len(prepared) == 359


@given(st.integers(1, 2000), st.integers(2, 300), st.integers(0, 2**40), st.integers(0, 99))
def test_an_epoch_is_a_permutation_in_batches_of_nearly_equal_size(
    samples, size, seed, epoch
) -> None:
    batches = shuffled_batches(samples, size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(samples))

    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= max(size, 3)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or samples == 1
    assert shuffled_batches(samples, size, seed, epoch) == batches


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [
        shuffled_batches(50, 50, seed, epoch)[0] for seed in range(3) for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    images = ArrayImages(("a", "b"), pixels, np.arange(30) % 2)
    augmentation = PadCrop(kind="pad-crop", flip=0.5)
    color = ColorConfig(lighting=0.1)
    view = AugmentedDataset(images, augmentation, Preprocess(resize=12, crop=12), 0, 0, color)
    batches = shuffled_batches(30, 8, 0, 0)
    alone, shared = (
        list(load_batches(view, batches, workers, torch.device("cpu"))) for workers in (0, 2)
    )

    assert len(alone) == len(shared) == 4
    for (left, a), (right, b) in zip(alone, shared, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(a, b)
        assert left.dtype == torch.uint8
    assert not multiprocessing.active_children()


MODEL = ["model.name=dsop-resnet8", "model.config={aux_widths=[8,8,8], iterations=2}"]
SMALL = [*MODEL, "preprocess.resize=20", "preprocess.crop=16", "batch_size=3", "epochs=2"]


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """Write photos with three unreadable files: two for training, one held out."""
    root = write_photos(tmp_path / "photos")
    (root / "train" / "cat" / "1.jpg").write_bytes(b"no image")
    (root / "train" / "dog" / "2.jpg").write_bytes(jpeg(1)[:-300])
    (root / "val" / "dog" / "0.jpg").write_bytes(b"")
    return root


def recipe_for(path: Path, *settings: str):
    return read_recipe("photos-dsop", [*SMALL, f"data.path={path}", *settings])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_and_names_all_unreadable_images(spoilt, tmp_path, workers) -> None:
    with pytest.raises(DataError) as problem:
        train_recipe(recipe_for(spoilt, f"workers={workers}"), tmp_path / "run")

    text = str(problem.value)
    assert text.startswith("3 images ")
    for name in ("val/dog/0.jpg", "train/cat/1.jpg", "train/dog/2.jpg"):
        assert f"{name}: " in text
    assert "\n" not in text

    met = DataError("a/5.jpg: cannot be read")  # a single unreadable image keeps its own error
    assert unreadable_images_error(met, open_data(recipe_for(spoilt).data).held_out) is met


class CountedImages(ArrayImages):
    """Images that count how often each is opened, in this process."""

    opened: list[int] = []  # noqa: RUF012

    def preprocess(self, index: int, *rules):
        self.opened.append(index)
        return super().preprocess(index, *rules)


def counted_images(monkeypatch, count: int = 30) -> CountedImages:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 14, 12, 3), dtype=np.uint8)
    monkeypatch.setattr(CountedImages, "opened", [])
    return CountedImages(("a", "b"), pixels, np.arange(count) % 2)


PADDED = PadCrop(kind="pad-crop", flip=0.5)
FITTED = Preprocess(resize=12, crop=12)


@pytest.mark.parametrize("limit", [2**29, 0], ids=["in memory", "too many"])
def test_pixels_in_memory_are_computed_once_and_give_the_same_batches(
    monkeypatch, limit
) -> None:
    monkeypatch.setattr(network_inputs, "MAX_IN_MEMORY", limit)
    images = counted_images(monkeypatch)
    in_memory = network_inputs.FittedPixels(images, FITTED)

    for epoch in range(3):
        plain = AugmentedDataset(images, PADDED, FITTED, 0, epoch)
        kept = replace(plain, fitted=in_memory)
        expected = list(plain.pixels(range(60)))
        images.opened.clear()
        assert np.array_equal(kept.batch(range(60))[0], expected)
        assert len(images.opened) == (60 if not limit else 0 if epoch else 30)

    mask = np.arange(30) % 3 == 1
    part = PreprocessedDataset(images, FITTED, 2, fitted=in_memory).select(mask)
    expected_part = PreprocessedDataset(images.select(mask), FITTED, 2).batch(range(10))

    assert all(map(np.array_equal, part.batch(range(10)), expected_part))

    build, arguments = in_memory.__reduce__()  # for processes that are not forked
    assert np.array_equal(build(*arguments).read([3, 1]), in_memory.read([3, 1]))


def test_the_processes_of_a_run_load_all_epochs_and_fill_the_memory(monkeypatch) -> None:
    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "start",
        lambda self: (started.append(self), start(self)),
    )
    monkeypatch.setattr(data_batches, "usable_cores", lambda: 2)
    images = counted_images(monkeypatch)
    others = counted_images(monkeypatch, 7)
    training = AugmentedDataset(
        images, PADDED, FITTED, 0, 0, fitted=network_inputs.FittedPixels(images, FITTED)
    )
    held_out = PreprocessedDataset(others, FITTED)
    cpu = torch.device("cpu")
    with data_batches.Loader((training, held_out), 2, cpu) as loader:
        for epoch in range(3):
            of_epoch = replace(training, epoch=epoch)
            batches = shuffled_batches(30, 8, 0, epoch)
            for dataset, chosen in ((of_epoch, batches), (held_out, [[0, 3], [6]])):
                loaded = list(load_batches(dataset, chosen, loader, cpu))
                alone = list(load_batches(replace(dataset, fitted=None), chosen, 0, cpu))
                assert all(
                    torch.equal(a, b)
                    for x, y in zip(loaded, alone, strict=True)
                    for a, b in zip(x, y, strict=True)
                )

    assert len(started) == 2

    images.opened.clear()
    training.fitted.read(range(30))  # type: ignore[union-attr]
    assert not images.opened

    del loader
    assert not multiprocessing.active_children()


def test_an_epoch_that_ends_early_leaves_no_batch_for_the_next_one(monkeypatch) -> None:
    images = counted_images(monkeypatch)
    cpu = torch.device("cpu")
    dataset = PreprocessedDataset(images, FITTED)
    with data_batches.Loader((dataset,), 1, cpu) as loader:
        next(load_batches(dataset, [[number] for number in range(30)], loader, cpu))
        ((pixels, _),) = load_batches(dataset, [[29]], loader, cpu)

    assert np.array_equal(pixels[0], dataset.pixels([29])[0])
