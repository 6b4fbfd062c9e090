"""Mixup, cutmix, RandAugment, erasing and the balanced order: functions of where they are drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.data.augment import AugmentedDataset, CenterCrop
from sopdeploy.data.base import ArrayImages
from sopdeploy.data.batches import balanced_batches, load_batches
from sopdeploy.data.rand_augment import Mixup, RandAugment
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.loop import train
from sopdeploy.training.losses import training_loss
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

RULES = Preprocess(resize=16, crop=16)
WAYS = [Mixup(mixup=0.4), Mixup(cutmix=1.0), Mixup(mixup=0.4, cutmix=1.0)]


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.arange(size) % 3


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("mix", WAYS, ids=str)
def test_a_batch_of_any_size_is_mixed_with_soft_labels(mix, size) -> None:
    torch.manual_seed(0)
    images, labels = batch(size)
    mixed, shares = mix(images, labels, 3)
    assert mixed.shape == images.shape
    assert shares.shape == (size, 3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(size))
    loss = training_loss(torch.randn(size, 3), shares, {"main": 1.0}, 0.1)
    assert bool(loss.total.isfinite())


@pytest.mark.parametrize("mix", WAYS, ids=str)
def test_mixing_depends_on_the_seed_of_the_step(mix) -> None:
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(mix(*batch(6), 3)[0])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_mixup_blends_images_and_labels_equally() -> None:
    torch.manual_seed(0)
    images, labels = batch(3)
    mixed, shares = Mixup(mixup=1.0)(images, labels, 3)
    share = shares[0, 0]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


def test_mixup_and_cutmix_are_both_drawn_if_enabled() -> None:
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    kinds = set()
    for _ in range(20):
        mixed, _ = Mixup(mixup=1.0, cutmix=1.0)(images, torch.tensor([0, 1]), 2)
        kinds.add(bool(((mixed == 0) | (mixed == 1)).all()))
    assert kinds == {True, False}


def test_disabled_mixing_changes_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    images, labels = batch(4)
    same, classes = Mixup()(images, labels, 3)
    assert same is images
    assert classes is labels
    assert torch.equal(torch.get_rng_state(), before)


def images(count: int = 12) -> ArrayImages:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return ArrayImages(("a", "b"), images, np.arange(count) % 2)


def view(distortion: RandAugment, epoch: int = 0) -> AugmentedDataset:
    return AugmentedDataset(images(), CenterCrop(kind="center"), RULES, 0, epoch, distortion)


DISTORTIONS = [RandAugment(ops=2), RandAugment(erase=1.0), RandAugment(ops=1, magnitude=20, erase=0.5)]


@pytest.mark.parametrize("distortion", DISTORTIONS, ids=str)
def test_rand_augment_depends_on_seed_epoch_and_sample_only(distortion) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = ([view(distortion)[index][0] for index in order] for order in (range(12), range(12)))
    backwards = [view(distortion)[index][0] for index in reversed(range(12))][::-1]
    assert np.array_equal(first, again)
    assert np.array_equal(first, backwards)
    assert not np.array_equal(first, [view(distortion, epoch=1)[index][0] for index in range(12)])
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].dtype == np.uint8
    assert first[0].shape == (16, 16, 3)


def test_an_erased_box_has_the_mean_color() -> None:
    before, after = view(RandAugment())[3][0], view(RandAugment(erase=1.0))[3][0]
    changed = (before != after).any(axis=2)
    assert changed.any()
    mean = [round(255 * value) for value in RULES.mean]
    assert all(pixel.tolist() == mean for pixel in after[changed])


def test_a_repeated_sample_is_augmented_differently() -> None:
    shown = view(RandAugment(ops=2, magnitude=20))
    (first, label), (second, same) = shown[3], shown[3 + len(shown)]
    assert label == same
    assert not np.array_equal(first, second)


def test_rand_augment_does_not_depend_on_the_number_of_workers() -> None:
    cpu = torch.device("cpu")
    batches = balanced_batches(images().targets, 5, 0, 0)
    alone, shared = (list(load_batches(view(DISTORTIONS[2]), batches, n, cpu)) for n in (0, 2))
    for (left, _), (right, _) in zip(alone, shared, strict=True):
        assert torch.equal(left, right)


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    size=st.integers(2, 40),
    epoch=st.integers(0, 5),
)
def test_a_balanced_epoch_uses_every_class_equally_often(counts, size, epoch) -> None:
    targets = np.repeat(np.arange(len(counts)), counts)
    batches = balanced_batches(targets, size, 3, epoch)
    assert batches == balanced_batches(targets, size, 3, epoch)
    positions = np.concatenate([np.asarray(part) for part in batches])
    assert len(positions) == len(set(positions.tolist())) == len(targets)
    assert max(map(len, batches)) <= size
    samples = positions % len(targets)
    shown = [int((targets[samples] == target).sum()) for target, count in enumerate(counts) if count]
    assert max(shown) - min(shown) <= 1
    for target in range(len(counts)):
        showings = np.bincount(samples[targets[samples] == target], minlength=len(targets))
        own = showings[targets == target]
        assert own.size == 0 or own.max() - own.min() <= 1


def test_a_run_with_balanced_sampling_differs_from_a_shuffled_one(tmp_path) -> None:
    results = [
        train(short_recipe("epochs=1", f"sampler='{way}'"), tmp_path / way)
        for way in ("balanced", "shuffled")
    ]
    rows = [result.history.read_text().splitlines()[1].split(",")[2] for result in results]
    assert rows[0] != rows[1]
