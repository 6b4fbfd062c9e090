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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.decision import Activation
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import create_model, make_config
from sopdeploy.training.few_shot.config import (
    FEATURES_FILE,
    FewShotConfig,
    FewShotResult,
    FineTuningResult,
    HeadResult,
)
from sopdeploy.training.few_shot.features import Features, compute_features
from sopdeploy.training.few_shot.head import (
    Array,
    HeadEstimate,
    HeadProblem,
    LinearHead,
    assign_folds,
    cross_validate,
    loss_and_gradient,
)
from sopdeploy.training.few_shot.last_stage import (
    LastStageTrainer,
    StageData,
    copy_tail,
    cut_before_last_stage,
    set_head,
)
from sopdeploy.training.fine_tuning import classifier_name
from sopdeploy.training.recipe import Recipe

Progress = Callable[[str, int, int], None]  # name of the step, done, total


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trained network with the complete config, and what is known about it.

    `logits_NC` are those of the training images out of fold, `targets_NC` their targets in 0..1.
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
    targets_NC, activation, strata = class_targets(images)
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
    counts = targets_NC.sum(axis=0)
    balanced = activation == "softmax" and counts.max() > config.balance_above * counts.min()
    weights_N = targets_NC @ (counts.mean() / counts) if balanced else np.ones(len(images))
    with timer.step("head"):
        folds_N = make_folds(features, strata, config.folds, recipe.seed)
        heads = []
        for number, ((pooling, network), vectors) in enumerate(
            zip(models.items(), features.vectors, strict=True)
        ):
            on("cross-validation of the head", number, len(models))
            problem = HeadProblem.create(vectors.numpy(), targets_NC, weights_N, activation)
            heads.append(FittedHead(pooling, network, problem, cross_validate(problem, folds_N), number))
        heads.sort(key=lambda head: head.loss)
        chosen = heads[0]
        everything = np.arange(len(images))
        head = chosen.problem.linear(chosen.problem.fit(everything, chosen.estimate.l2))
        on("cross-validation of the head", len(models), len(models))
    with timer.step("fine-tuning"):
        tuned, tuning = fine_tune(recipe, config, chosen, head, features, strata, on)
    if tuned is None:
        set_head(chosen.network, head)
    logits_NC = chosen.estimate.logits if tuned is None else tuned
    losses, _ = loss_and_gradient(logits_NC, targets_NC, activation)
    right = correct(logits_NC, targets_NC, activation)
    result = FewShotResult(
        top1=Rate.of(int(right.sum()), len(images)),
        estimated_on="cross-validation",
        class_counts={label: int(count) for label, count in zip(images.labels, counts, strict=True)},
        balanced=bool(balanced),
        duplicates=len(features.keys) - len(set(features.keys)),
        heads=tuple(one.result() for one in heads),
        fine_tuning=tuning,
        seconds=timer.seconds,
    )
    network_config = chosen.network.config.model_dump(mode="json")
    return Outcome(chosen.network, network_config, logits_NC, targets_NC, result, float(losses.mean()))


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A network with its head problem and estimate; `index` is its position in the features."""

    pooling: str
    network: Classifier
    problem: HeadProblem
    estimate: HeadEstimate
    index: int

    @property
    def loss(self) -> float:
        """Mean weighted loss out of fold."""
        everything = np.arange(len(self.problem.targets))
        return float(self.problem.losses(self.estimate.logits, everything).mean())

    def result(self) -> HeadResult:
        """Describe the head in the record."""
        problem = self.problem
        right = correct(self.estimate.logits, problem.targets, problem.activation)
        return HeadResult(
            pooling=self.pooling,
            features=problem.basis.shape[1],
            top1=float(right.mean()),
            loss=self.loss,
            l2=self.estimate.l2,
        )


def class_targets(images: LabeledImages) -> tuple[Array, Activation, list[int]]:
    """Return targets (N, C) in 0..1, the activation, and the stratum of each image for the folds.

    With several classes per image, the stratum is the rarest of them, or -1.
    """
    targets = images.targets
    if targets.ndim == 1:
        return np.eye(len(images.labels))[targets], "softmax", targets.tolist()
    counts = targets.sum(axis=0)
    rarest = np.where(targets > 0, counts, np.iinfo(np.int64).max).argmin(axis=1)
    return targets.astype(np.float64), "sigmoid", np.where(targets.any(axis=1), rarest, -1).tolist()


def candidate_networks(recipe: Recipe, model: Classifier, config: FewShotConfig) -> dict[str, Classifier]:
    """Build a network for each pooling of `few_shot.heads`, with the weights of *model* elsewhere.

    Raises `ConfigError` if the pooling of the network cannot be set.
    """
    if not config.heads:
        return {str(getattr(getattr(model.config, "pooling", None), "kind", "own")): model}
    networks = {}
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
        networks[pooling.kind] = network.to(next(model.parameters()).device)  # type: ignore[attr-defined]
    return networks


def make_folds(features: Features, strata: list[int], folds: int, seed: int) -> NDArray[np.intp]:
    """Assign folds, at most as many as the smallest stratum has images.

    Raises `DataError` if all images are the same.
    """
    smallest = min(strata.count(stratum) for stratum in set(strata))
    folds_N = assign_folds(strata, features.keys, max(2, min(folds, smallest)), seed)
    if folds_N.max() == 0:
        raise DataError("all training images have the same pixels; cross-validation needs different images")
    return folds_N


def correct(logits_NC: Array, targets_NC: Array, activation: Activation) -> Array:
    """Compute whether each image is right (N,); with "sigmoid", the fraction of its classes."""
    if activation == "sigmoid":
        fractions: Array = ((logits_NC > 0) == (targets_NC > 0.5)).mean(axis=1)
        return fractions
    return (logits_NC.argmax(axis=1) == targets_NC.argmax(axis=1)).astype(np.float64)


def fine_tune(
    recipe: Recipe,
    config: FewShotConfig,
    chosen: FittedHead,
    head: LinearHead,
    features: Features,
    strata: list[int],
    on: Progress,
) -> tuple[Array | None, FineTuningResult]:
    """Fine-tune the last stage of the network of *chosen* if cross-validation shows a gain.

    Returns the logits (N, C) out of fold, or `None` if the network stays as it is.
    """
    tuning, problem, vectors = config.fine_tuning, chosen.problem, features.vectors[chosen.index]
    if tuning.epochs == 0:
        return None, FineTuningResult(kept=False, reason="disabled by few_shot.fine_tuning.epochs = 0")
    inputs = features.stage_inputs
    if inputs is None:
        return None, FineTuningResult(
            kept=False, reason=f"not tried: the inputs of the last stage exceed {tuning.max_gib:g} GiB"
        )
    device = next(chosen.network.parameters()).device
    tail = cut_before_last_stage(chosen.network, inputs[:4, 0].to(device), vectors[:4, 0].to(device))
    if tail is None:
        return None, FineTuningResult(
            kept=False, reason="not tried: this network has no separable last stage"
        )

    data = StageData(
        inputs,
        torch.from_numpy(problem.targets).float(),
        torch.from_numpy(problem.weights).float(),
        problem.activation,
    )

    def trainer(start: LinearHead, fitted: NDArray[np.intp]) -> LastStageTrainer:
        return LastStageTrainer(tail, start, data, fitted, tuning, recipe.seed)

    folds_N = make_folds(features, strata, tuning.folds, recipe.seed)
    before, curve_ENC = cross_validate_epochs(problem, folds_N, trainer, tuning.epochs, tuning.patience, on)
    everything = np.arange(len(folds_N))
    losses_EN = problem.losses(curve_ENC, everything)
    epochs = int(losses_EN.sum(axis=1).argmin())
    chosen_N = np.zeros(len(folds_N), np.intp)
    for fold in range(int(folds_N.max()) + 1):
        chosen_N[folds_N == fold] = losses_EN[:, folds_N != fold].sum(axis=1).argmin()
    after = curve_ENC[chosen_N, everything]
    right = [float(correct(x, problem.targets, problem.activation).mean()) for x in (before, after)]
    losses = [float(problem.losses(x, everything).mean()) for x in (before, after)]
    kept = epochs > 0 and right[1] > right[0] and losses[1] < losses[0]
    result = FineTuningResult(
        kept=kept,
        reason="more images are right and the loss is smaller"
        if kept
        else "not more images are right"
        if right[1] <= right[0]
        else "the loss is not smaller",
        epochs=epochs,
        top1_before=right[0],
        top1_after=right[1],
        loss_before=losses[0],
        loss_after=losses[1],
    )
    if not kept:
        return None, result
    final = trainer(head, everything)
    for epoch in range(epochs):
        on("fine-tuning on all images", epoch, epochs)
        final.train_epoch()
    copy_tail(final.model, chosen.network)
    return after, result


def cross_validate_epochs(
    problem: HeadProblem,
    folds_N: NDArray[np.intp],
    trainer: Callable[[LinearHead, NDArray[np.intp]], LastStageTrainer],
    epochs: int,
    patience: int,
    on: Progress,
) -> tuple[Array, Array]:
    """Fine-tune without each fold in turn, all of them epoch by epoch.

    Returns the logits (N, C) of the head alone and those after 0, 1, ... epochs (E, N, C), all out of fold.
    It stops `patience` epochs after the smallest loss.
    """
    estimate, images = cross_validate(problem, folds_N), np.arange(len(folds_N))
    trainers = []
    for fold, l2 in enumerate(estimate.l2_of_fold):
        fitted = images[folds_N != fold]
        trainers.append((trainer(problem.linear(problem.fit(fitted, l2)), fitted), images[folds_N == fold]))
    curve = [estimate.logits]
    totals = [float(problem.losses(estimate.logits, images).sum())]
    for epoch in range(epochs):
        logits = np.zeros_like(estimate.logits)
        for number, (one, tested) in enumerate(trainers):
            on("cross-validation of fine-tuning", epoch * len(trainers) + number, epochs * len(trainers))
            one.train_epoch()
            logits[tested] = one.logits(tested)
        curve.append(logits)
        totals.append(float(problem.losses(logits, images).sum()))
        if len(totals) - 1 - int(np.argmin(totals)) >= patience:
            break
    return estimate.logits, np.stack(curve)
