"""The few-shot procedure: a head on frozen features, then fine-tuning where cross-validation shows a gain.

1. Compute the features of the frozen backbone once and fit the linear head. `l2` and, with several `heads`,
   the pooling are those with the smallest cross-validated loss.
2. Fine-tune the last stage with layer-wise learning rates. The number of epochs has the smallest
   cross-validated loss. The result is kept only if more images out of fold are classified correctly than
   with the head alone and their mean loss is smaller, on the same folds; the number of epochs of a fold is
   chosen on the other folds.
3. Fit the chosen network to all training images.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import create_model, make_config
from sopdeploy.training.few_shot.config import FEATURES_FILE, FewShotConfig, FewShotResult
from sopdeploy.training.few_shot.features import Features, compute_features
from sopdeploy.training.few_shot.head import Array, HeadProblem, cross_validate, loss_and_gradient
from sopdeploy.training.few_shot.last_stage import set_head
from sopdeploy.training.few_shot.tuning import FittedHead, Progress, Targets, correct, fine_tune, make_folds
from sopdeploy.training.fine_tuning import classifier_name
from sopdeploy.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trained network with the complete config, and what is known about it.

    `logits` (N, C) are those of the training images out of fold, `targets` (N, C) their targets in [0, 1].
    """

    model: Classifier
    config: dict[str, object]
    logits: Array
    targets: Array
    result: FewShotResult
    loss: float


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

    A held-out set that was selected from the training images and is smaller than `min_held_out` becomes
    empty: cross-validation on all images is more precise.
    """
    config = recipe.few_shot
    if config is None or data.train.targets.ndim > 1 or len(data.train) > config.max_images:
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

    Raises `ConfigError` if the network has no linear classifier or the pooling cannot be changed, `DataError`
    if the images of a class are too few or all the same.
    """
    config, timer = recipe.few_shot or FewShotConfig(), Timer()
    targets = class_targets(images, config)
    models = candidate_networks(recipe, model, config)
    out.mkdir(parents=True, exist_ok=True)
    with timer.step("features"):
        features = compute_features(
            list(models.values()),
            images,
            recipe.preprocess,
            workers=recipe.workers,
            max_gib=config.fine_tuning.max_gib if config.fine_tuning.epochs else 0.0,
            cache=out / FEATURES_FILE,
            on_image=lambda done, total: on("features of the frozen backbone", done, total),
        )
    with timer.step("head"):
        heads = fit_heads(
            models, features, targets, make_folds(features, targets, config.folds, recipe.seed), on
        )
        chosen = heads[0]
        head = chosen.problem.linear(chosen.problem.fit(np.arange(len(images)), chosen.estimate.l2))
    with timer.step("fine-tuning"):
        tuned, tuning = fine_tune(config.fine_tuning, chosen, head, features, targets, recipe.seed, on)
    if tuned is None:
        set_head(chosen.network, head)
    logits_NC = chosen.estimate.logits if tuned is None else tuned
    right = correct(logits_NC, targets.classes, targets.activation)
    counts = targets.classes.sum(axis=0)
    result = FewShotResult(
        top1=Rate.of(int(right.sum()), len(images)),
        estimated_on="cross-validation",
        class_counts={label: int(count) for label, count in zip(images.labels, counts, strict=True)},
        balanced=targets.balanced,
        duplicates=len(features.keys) - len(set(features.keys)),
        heads=tuple(one.result() for one in heads),
        fine_tuning=tuning,
        seconds=timer.seconds,
    )
    config_of_network = chosen.network.config.model_dump(mode="json")
    losses, _ = loss_and_gradient(logits_NC, targets.classes, targets.activation)
    return Outcome(
        chosen.network, config_of_network, logits_NC, targets.classes, result, float(losses.mean())
    )


def fit_heads(
    models: dict[str, Classifier],
    features: Features,
    targets: Targets,
    folds_N: NDArray[np.intp],
    on: Progress,
) -> list[FittedHead]:
    """Cross-validate the head of each of *models*, by pooling; returns the smallest loss first."""
    heads = []
    for number, (pooling, network) in enumerate(models.items()):
        on("cross-validation of the head", number, len(models))
        vectors = features.vectors[number].numpy()
        problem = HeadProblem.create(vectors, targets.classes, targets.weights, targets.activation)
        heads.append(FittedHead(pooling, network, problem, cross_validate(problem, folds_N), number))
    on("cross-validation of the head", len(models), len(models))
    return sorted(heads, key=lambda head: head.loss)


def class_targets(images: LabeledImages, config: FewShotConfig) -> Targets:
    """Convert the targets of *images*: class indices (N,), or with several classes per image 0 or 1 (N, C).

    With several classes per image, the stratum is the rarest of them, or -1, and classes are not balanced.
    """
    targets = images.targets
    if targets.ndim == 1:
        classes = np.eye(len(images.labels))[targets]
        counts = classes.sum(axis=0)
        balanced = bool(counts.max() > config.balance_above * counts.min())
        weights = classes @ (counts.mean() / counts) if balanced else np.ones(len(images))
        return Targets(classes, weights, targets.tolist(), "softmax", balanced)
    rarest = np.where(targets > 0, targets.sum(axis=0), np.iinfo(np.int64).max).argmin(axis=1)
    strata = np.where(targets.any(axis=1), rarest, -1).tolist()
    return Targets(targets.astype(np.float64), np.ones(len(images)), strata, "sigmoid", False)


def candidate_networks(recipe: Recipe, model: Classifier, config: FewShotConfig) -> dict[str, Classifier]:
    """Build a network for each pooling of `few_shot.heads`, with the weights of *model* elsewhere.

    Raises `ConfigError` if the pooling of the network cannot be set.
    """
    if not config.heads:
        return {str(getattr(getattr(model.config, "pooling", None), "kind", "own")): model}
    networks: dict[str, Classifier] = {}
    for pooling in config.heads:
        values = {**recipe.model.config, "pooling": pooling.model_dump()}
        try:
            make_config(recipe.model.name, values)
        except ConfigError as error:
            raise ConfigError(f"few_shot.heads: {error}; leave heads empty") from error
        network = create_model(recipe.model.name, num_classes=model.num_classes, **values)
        own, weights = network.state_dict(), model.state_dict()
        same = {
            name: tensor
            for name, tensor in weights.items()
            if name in own
            and own[name].shape == tensor.shape
            and not is_in(name, "pooling", classifier_name(model))
        }
        network.load_state_dict({**own, **same})
        networks[pooling.kind] = network.to(next(model.parameters()).device)
    return networks
