"""Fine-tuning on photographs by the recipes of sopdeploy, and the accuracy of the exported network.

A run is that of `sopdeploy train --recipe NAME --data FOLDER`, on the photographs that a seed
draws, with smaller images. Of a folder with train/ and test/, a draw trains on some of train/ and
tests on test/; of another folder, it tests on the photographs that it does not train on.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.errors import DataError
from sopdeploy.evaluation.prediction import predict_logits
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.network_inputs import PreprocessedDataset
from sopdeploy.photos.photo import LabeledImages, Split
from sopdeploy.seeds import derive_seed
from sopdeploy.training.recipe import Recipe, change_recipe
from sopdeploy.training.recipe_files import read_values
from sopdeploy.training.setup import NOTHING_GIVEN, RunImages
from sopdeploy.training.train import train_run

BATCH = 32  # of the evaluation


class PhotosConfig(StrictModel):
    """`per_class` photographs of each class for training, and at most `test` others; images of `side` pixels."""

    folder: Path
    per_class: int = 25
    test: int = 300
    side: int = 128


class Draw(NamedTuple):
    """The photographs of a seed; `tested` has the positions of those for testing among all `pool`."""

    train: LabeledImages
    test: LabeledImages
    tested: NDArray[np.int64]
    pool: int


class Predictions(NamedTuple):
    """Logits (N, C) float64 of the exported network, the labels (N,), and what the training cost.

    `seconds` are CPU seconds from the recipe to the trained network, `parameters` those of the
    exported network, and `loss` is the training loss of the last epoch.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    draw: Draw
    seconds: float
    parameters: int
    loss: float


def draw_photos(config: PhotosConfig, seed: int) -> Draw:
    """Draw the photographs of *seed*: `per_class` of each class for training, and those for testing."""
    split = open_folder(config.folder)
    random = np.random.default_rng(derive_seed(seed, "subset"))

    # Of each class, the same number for training.
    targets = split.train.targets
    is_drawn = np.zeros(len(targets), np.bool_)
    for label, name in enumerate(split.train.labels):
        members = random.permutation(np.flatnonzero(targets == label))
        if len(members) < config.per_class:
            raise DataError(
                f"{config.folder}: {len(members)} photographs of {name}; "
                f"at least {config.per_class} needed"
            )
        is_drawn[members[: config.per_class]] = True

    # The others, or the part test/, are for testing.
    has_test = len(split.held_out) > 0
    source = split.held_out if has_test else split.train
    others = np.arange(len(source)) if has_test else np.flatnonzero(~is_drawn)
    tested = np.sort(random.permutation(others)[: config.test])

    is_tested = np.zeros(len(source), np.bool_)
    is_tested[tested] = True
    return Draw(split.train.select(is_drawn), source.select(is_tested), tested, len(source))


def recipe_of(config: PhotosConfig, name: str, changes: dict[str, Any]) -> Recipe:
    """Read the recipe *name* for the images of *config*, on one thread, with other *changes*."""
    values = {
        "data.path": str(config.folder),
        "preprocess.crop": config.side,
        "threads": 1,
        "channels_last": True,  # a third faster on a CPU
        **changes,
    }
    return change_recipe(read_values(name), list(values.items()), name)


def train_and_predict(
    config: PhotosConfig, name: str, changes: dict[str, Any], seed: int
) -> Predictions:
    """Train by the recipe *name* with *changes* on the draw of *seed*, and classify its test photographs."""
    draw = draw_photos(config, seed)
    recipe = recipe_of(config, name, {"seed": seed, **changes})

    # The loop needs validation images, which decide nothing, because its last epoch counts.
    first = np.unique(draw.test.targets, return_index=True)[1]
    is_first = np.isin(np.arange(len(draw.test)), first)
    is_loop = recipe.procedure.kind != "few_shot"
    data = (
        Split(train=draw.train, held_out=draw.test.select(is_first))
        if is_loop
        else Split.undivided(draw.train)
    )

    with TemporaryDirectory() as folder:
        start = time.process_time()
        given = NOTHING_GIVEN._replace(images=RunImages(data))
        run = train_run(recipe, Path(folder) / "run", given=given)
        seconds = time.process_time() - start
        network, rules = trained_network(
            Path(folder) / "run" / ("last.pt" if is_loop else "best.pt")
        )

    logits, labels = predict_logits(
        network, PreprocessedDataset(draw.test, rules), rules, batch_size=BATCH
    )
    history = run.fit.position.history
    return Predictions(
        torch.from_numpy(logits),
        torch.from_numpy(labels.astype(np.int64)),
        draw,
        seconds,
        sum(parameter.numel() for parameter in network.parameters()),
        history[-1].losses["main"] if is_loop else 0.0,
    )


def trained_network(path: Path) -> tuple[nn.Module, Preprocess]:
    """Read the checkpoint at *path*, and remove what the exported network does not have."""
    checkpoint = read_checkpoint(path)
    network = build_classifier(checkpoint, path)
    exported = network.inference_model()
    weights = network.state_dict()
    exported.load_state_dict({name: weights[name] for name in exported.state_dict()})
    return exported.to(memory_format=torch.channels_last).eval(), checkpoint.preprocess
