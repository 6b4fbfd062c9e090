"""The few-shot procedure: a head on frozen features, then fine-tuning where cross-validation shows a gain.

1. Compute the features of the frozen backbone once and fit linear heads on the pooling of the network and on
   other poolings. `l2` is the value with the smallest cross-validated loss.
2. Fine-tune the last stage of the chosen network with layer-wise learning rates: alone, with the branches of
   DSoP, with a GSoP block. The number of epochs is the one with the smallest cross-validated loss.
3. Fit the chosen network to all training images.

A candidate replaces the simpler one only if its out-of-fold score is higher and its loss smaller. The
reported score includes the effect of choosing, because the choice for a fold is made on the other folds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import entry
from sopdeploy.training.few_shot.config import FEATURES_FILE, FewShotConfig, FewShotResult
from sopdeploy.training.few_shot.estimates import Targets
from sopdeploy.training.few_shot.features import compute_features
from sopdeploy.training.few_shot.head import Array
from sopdeploy.training.few_shot.heads import class_targets, compare_heads, make_folds
from sopdeploy.training.few_shot.last_stage import set_head
from sopdeploy.training.few_shot.networks import head_networks
from sopdeploy.training.few_shot.tuning import Progress, fine_tune
from sopdeploy.training.few_shot.unknown import LeftOut, leave_classes_out
from sopdeploy.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trained network, its `name` in the catalog, its complete config, and its estimates.

    `logits` (N, C) are the out-of-fold logits of the training images, `targets` (N, C) their targets in
    [0, 1], and `loss` is their mean loss. `left_out` are the logits of heads fitted without one class.
    """

    name: str
    model: Classifier
    config: dict[str, object]
    logits: Array
    targets: Array
    result: FewShotResult
    loss: float
    left_out: tuple[LeftOut, ...]


@dataclass(slots=True)
class Timer:
    """Seconds of named steps."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a step."""
        since = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - since, 3)


def select_split(recipe: Recipe, data: Split) -> tuple[Split, bool]:
    """Return the images to train on, and whether the few-shot procedure applies to them.

    The procedure needs feature maps, so the training loop trains networks without them. If the held-out set
    was selected from the training images and is smaller than `min_held_out`, its images are trained on, too,
    because cross-validation on all images is more precise.
    """
    config = recipe.few_shot
    if config is None or len(data.train) > config.max_images or not entry(recipe.model.name).feature_maps:
        return data, False
    train, held_out = data.train, data.held_out
    if not (isinstance(train, ImageFiles) and isinstance(held_out, ImageFiles)):
        return data, True
    if not data.divided or len(held_out) >= config.min_held_out:
        return data, True
    paths = np.concatenate([train.paths, held_out.paths])
    order = np.argsort(paths, kind="stable")
    targets = np.concatenate([train.targets, held_out.targets])
    joined = replace(train, paths=paths[order], targets=targets[order])
    return replace(data, train=joined, held_out=joined.select(np.zeros(len(joined), np.bool_))), True


def fit_few_shot(
    recipe: Recipe, model: Classifier, images: LabeledImages, out: Path, on: Progress
) -> Outcome:
    """Run the procedure for *images*, starting from *model*; features are cached in the folder *out*.

    *on* receives the progress. Raises `ConfigError` if the network has no linear classifier or the pooling
    cannot be changed, `DataError` if all images have the same pixels.
    """
    config, timer, seed = recipe.few_shot or FewShotConfig(), Timer(), recipe.seed
    targets = class_targets(images, config)
    networks = head_networks(recipe, model, config)
    out.mkdir(parents=True, exist_ok=True)
    with timer.step("features"):
        features = compute_features(
            [one.network for one in networks],
            images,
            recipe.preprocess,
            workers=recipe.workers,
            max_gib=config.fine_tuning.max_gib if config.fine_tuning.epochs else 0.0,
            cache=out / FEATURES_FILE,
            on_image=partial(on, "features of the frozen backbone"),
        )
    folds_N = make_folds(features, targets, config.folds, seed)
    with timer.step("head"):
        on_head = partial(on, "cross-validation of the head")
        heads = compare_heads(networks, features, targets, folds_N, seed, on_head)
    chosen = heads.chosen
    with timer.step("fine-tuning"):
        tuning = fine_tune(recipe, chosen, features, targets, on)
    if tuning.kept is None:
        everything = np.arange(len(images))
        set_head(chosen.network, chosen.problem.linear(chosen.problem.fit(everything, chosen.estimate.l2)))
    with timer.step("unknown images"):
        on("heads without one class", 0, 1)
        left_out = leave_classes_out(chosen.problem, folds_N, chosen.estimate.l2)
    logits_NC = heads.logits if tuning.logits is None else tuning.logits
    tail = None if tuning.kept is None else tuning.kept.tail
    network = chosen.network if tail is None else tail.network
    result = FewShotResult(
        **_score(targets, logits_NC, seed),
        estimated_on="cross-validation",
        class_counts=dict(zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)),
        balanced=targets.balanced,
        duplicates=len(features.keys) - len(set(features.keys)),
        candidates=(*heads.results, *tuning.results),
        seconds=timer.seconds,
    )
    return Outcome(
        name=(tail.catalog if tail is not None else None) or recipe.model.name,
        model=network,
        config=network.config.model_dump(mode="json"),
        logits=logits_NC,
        targets=targets.classes,
        result=result,
        loss=float((targets.losses(logits_NC) / targets.weights).mean()),
        left_out=left_out,
    )


def _score(targets: Targets, logits_NC: Array, seed: int) -> dict[str, Any]:
    """Estimate the score; return it as the field `top1` or `map` of `FewShotResult`."""
    score = targets.estimate(logits_NC, seed)
    return {"top1" if isinstance(score, Rate) else "map": score}
