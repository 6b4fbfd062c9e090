"""Vectors of photographs by EfficientNet-Lite0, and heads that the code of `train` fits to draws of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.photos.photo import LabeledImages
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.few_shot.classifier import MAX_RANK, LinearProblem, Space, unit_length
from sopdeploy.training.few_shot.cross_validation import make_folds
from sopdeploy.training.few_shot.features import (
    PROJECTION_IMAGES,
    CachedNetwork,
    FeatureBatch,
    full_head,
)
from sopdeploy.training.few_shot.scaling import OutOfFold, Scaling
from sopdeploy.training.few_shot.targets import Targets
from sopdeploy.training.head_settings import FewShotConfig
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.start_weights import create_initial_model

Array = NDArray[Any]
FOLDS = FewShotConfig().folds


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes of *folder*, sorted."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))


def open_network(weights: Path, *settings: str) -> CachedNetwork:
    """Build the network of the recipe for photographs, changed by *settings*, with the file *weights*."""
    recipe = read_recipe("photos", ["data.path=.", f"start.weights={weights}", *settings])
    model, recipe, _ = create_initial_model(
        recipe, ("one", "other"), Strategy(torch.device("cpu"))
    )
    return CachedNetwork(full_head(recipe, model), recipe)


@torch.no_grad()
def read_batches(network: CachedNetwork, images: LabeledImages) -> list[FeatureBatch]:
    """Compute the outputs of *network* for *images*, shuffled as in `train`."""
    return list(
        network.batches(images, np.random.default_rng(0).permutation(len(images)).tolist())
    )


@torch.no_grad()
def join_vectors(
    network: CachedNetwork, batches: Sequence[FeatureBatch], fitted: Sequence[FeatureBatch] = ()
) -> Array:
    """Compute the vectors (N, D) of *batches*; with *fitted*, first fit the projections to these."""
    pooled = network.network.pooled_head
    if fitted:
        pooled.fit_projection(
            [batch.maps for batch in fitted[: PROJECTION_IMAGES // network.batch_size]]
        )
    count = sum(len(batch.indices) for batch in batches)
    vectors = np.zeros((count, network.network.num_features()), np.float32)
    for batch in batches:
        outputs = pooled.vector(batch.own_vectors, batch.maps)
        vectors[batch.indices] = outputs.float().cpu().numpy()
    return vectors


class FittedDraw(NamedTuple):
    """A head in cross-validation on the photographs of a draw, which are numbered by `drawn`."""

    problem: LinearProblem
    folds: list[Array]
    validations: list[OutOfFold]
    scaling: Scaling


def draw_photographs(classes: Array, sizes: int | Array, random: np.random.Generator) -> Array:
    """Draw *sizes* photographs of each of *classes* (N,), at most all; return their indices by class."""
    count = int(classes.max()) + 1
    return np.concatenate(
        [
            random.permutation(np.flatnonzero(classes == label))[:size]
            for label, size in enumerate(np.broadcast_to(sizes, count))
        ]
    )


def fit_draw(
    vectors: Array,
    classes: Array,
    parts: Sequence[slice],
    seed: int,
    drawn: Array,
    num_classes: int,
    *,
    has_margins: bool = False,
) -> FittedDraw:
    """Cross-validate heads on *vectors* (n, D) of *drawn* photographs (n,), with the *classes* (n,).

    *has_margins* is that of the recipe, which `train --from` sets.
    """
    targets = Targets(np.eye(num_classes)[classes], classes, "softmax")
    by_part = [vectors[:, part] for part in parts]
    space = Space.of([part[:MAX_RANK] for part in by_part])
    problem = LinearProblem(space, space.project(vectors), unit_length(by_part[0]), targets)
    folds = make_folds(targets, [str(index) for index in drawn.tolist()], FOLDS, seed)
    validations = [problem.cross_validate(one) for one in folds]
    scaling = Scaling.fit(validations, targets, has_margins=has_margins)
    return FittedDraw(problem, folds, validations, scaling)
