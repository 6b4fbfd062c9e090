"""One step: precision, accumulation, compilation, the parts of the loss, and options of the papers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sopdeploy.data.augment import (
    COLOR_COMPONENTS,
    COLOR_DEVIATIONS,
    Augmentations,
    AugmentedDataset,
    ColorConfig,
    PadCrop,
)
from sopdeploy.data.batches import shuffled_batches
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.prediction import evaluate_network
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.settings.recipe import Recipe
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from tests.sopdeploy.training.runs import interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


LABELS = torch.tensor([0, 2, 1, 1])


def logits(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


@given(
    weights=st.lists(st.floats(0, 100), min_size=3, max_size=3),
    smoothing=st.floats(0, 0.9),
    penalty=st.floats(0, 10),
)
def test_the_loss_is_the_weighted_sum_of_all_heads_and_penalties(
    weights, smoothing, penalty
) -> None:
    branches = {"low": logits(1), "high": logits(2)}
    output = TrainingOutput(logits(0), branches, {"balance": torch.tensor(penalty)})
    named = dict(zip(("main", "low", "high"), weights, strict=True))
    loss = training_loss(output, LABELS, named, smoothing)
    expected = penalty + sum(
        weight * float(cross_entropy(logits(seed), LABELS, label_smoothing=smoothing))
        for seed, weight in enumerate(weights)
    )

    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert list(loss.parts) == ["main", "low", "high", "balance"]


STUDENT = ["model.name=resnet8", "model.config={base_width=4}", "epochs=2"]
STARRED = 'augment={kind="pad-crop", pad=4, doubled=true, held_out=true}'
COLOR = "color={lighting=0.1}"
FORMAT = ["precision='bf16'", "channels_last=true", "ema={decay=0.5}"]
ARRAY = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def all_options(*more: str) -> Recipe:
    return short_recipe(*STUDENT, STARRED, COLOR, *FORMAT, *more)


@pytest.fixture(scope="module")
def finished(few_digits: None, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train_recipe(all_options(), out / "run")
    return out / "run"


def test_a_run_with_all_options_resumes_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    interrupt(all_options(), tmp_path / "run", "step", 1, 3)
    train_recipe(all_options(), tmp_path / "run", resume=True)
    assert same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_has_plain_float32_weights(finished: Path, name: str) -> None:
    checkpoint = read_checkpoint(finished / name)
    weights = {**checkpoint.weights, **(checkpoint.resume or {}).get("weights", {})}
    assert {str(tensor.dtype) for tensor in weights.values()} <= {
        "torch.float32",
        "torch.int64",
    }

    build_classifier(checkpoint, finished / name)


def checkpoint_history(run: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = read_checkpoint(run / "last.pt").resume["position"][
        "history"
    ]
    return history


def test_held_out_images_are_padded_and_cropped_if_the_recipe_says_so(finished: Path) -> None:
    checkpoint = read_checkpoint(finished / "last.pt")
    model = build_classifier(checkpoint, finished / "last.pt")
    images, rules = open_data(all_options().data).held_out, checkpoint.preprocess
    cropped, plain = (
        evaluate_network(model, dataset, rules)
        for dataset in (
            PreprocessedDataset(images, rules, pad=4),
            PreprocessedDataset(images, rules),
        )
    )

    assert checkpoint_history(finished)[-1]["metrics"]["loss"] == pytest.approx(cropped.loss)
    assert cropped.loss != pytest.approx(plain.loss)


def test_an_epoch_of_doubled_images_has_each_image_and_its_mirror_image() -> None:
    images = ArrayImages(tuple("ab"), np.stack([ARRAY, ARRAY[::-1]]), np.array([0, 1]))
    recipe = all_options("batch_size=2", "color={}")
    copies = recipe.part(Augmentations).num_copies
    batches = shuffled_batches(copies * len(images), recipe.batch_size, recipe.seed, 0)

    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3]

    augment = PadCrop(kind="pad-crop", pad=4, doubled=True, flip=0.99)  # is ignored
    dataset = AugmentedDataset(images, augment, Preprocess(resize=8, crop=8), seed=0, epoch=0)
    for index, pixels in ((0, ARRAY), (2, ARRAY[:, ::-1])):
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
        crops = [
            padded[top : top + 8, left : left + 8] for top in range(9) for left in range(9)
        ]
        assert any(np.array_equal(dataset.pixels([index])[0], crop) for crop in crops)


def test_lighting_adds_multiples_of_the_principal_colors() -> None:
    assert ColorConfig()(ARRAY, 1) is ARRAY

    lighting = ColorConfig(lighting=0.1)
    assert np.array_equal(lighting(ARRAY, 1), lighting(ARRAY, 1))

    gray = np.full((4, 4, 3), 128, dtype=np.uint8)
    shifts = np.array([lighting(gray, seed)[0, 0] - 128.0 for seed in range(400)]) / 255
    expected = (
        COLOR_COMPONENTS @ np.diag(np.square(0.1 * COLOR_DEVIATIONS)) @ COLOR_COMPONENTS.T
    )

    assert np.cov(shifts.T) == pytest.approx(expected, abs=0.15 * expected.max())
