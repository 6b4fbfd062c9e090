"""The decision on fine-tuning: cross-validation of the number of epochs, paired with the head alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.decision import Activation
from sopdeploy.errors import DataError
from sopdeploy.models.base import Classifier
from sopdeploy.training.few_shot.config import FineTuningConfig, FineTuningResult, HeadResult
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.few_shot.head import (
    Array,
    HeadEstimate,
    HeadProblem,
    LinearHead,
    assign_folds,
    cross_validate,
)
from sopdeploy.training.few_shot.last_stage import (
    LastStageTrainer,
    StageData,
    copy_tail,
    cut_before_last_stage,
)

Progress = Callable[[str, int, int], None]  # name of the step, done, total
Trainer = Callable[[LinearHead, NDArray[np.intp]], LastStageTrainer]


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets `classes` (N, C) in 0..1, `weights` (N,) in the loss, and `strata` for the folds, per image."""

    classes: Array
    weights: Array
    strata: list[int]
    activation: Activation
    balanced: bool


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


def correct(logits_NC: Array, targets_NC: Array, activation: Activation) -> Array:
    """Compute whether each image is right (N,); with "sigmoid", the fraction of its classes."""
    if activation == "sigmoid":
        fractions: Array = ((logits_NC > 0) == (targets_NC > 0.5)).mean(axis=1)
        return fractions
    right: Array = (logits_NC.argmax(axis=1) == targets_NC.argmax(axis=1)).astype(np.float64)
    return right


def make_folds(features: Features, targets: Targets, folds: int, seed: int) -> NDArray[np.intp]:
    """Assign folds, at most as many as the smallest stratum has images.

    Raises `DataError` if all images are the same.
    """
    strata = targets.strata
    smallest = min(strata.count(stratum) for stratum in set(strata))
    folds_N = assign_folds(strata, features.keys, max(2, min(folds, smallest)), seed)
    if folds_N.max() == 0:
        raise DataError("all training images have the same pixels; cross-validation needs different images")
    return folds_N


def fine_tune(
    config: FineTuningConfig,
    chosen: FittedHead,
    head: LinearHead,
    features: Features,
    targets: Targets,
    seed: int,
    on: Progress,
) -> tuple[Array | None, FineTuningResult]:
    """Fine-tune the last stage of the network of *chosen* if cross-validation shows a gain.

    Returns the logits (N, C) out of fold, or `None` if the network stays as it is.
    """
    problem, vectors, inputs = chosen.problem, features.vectors[chosen.index], features.stage_inputs
    if config.epochs == 0:
        return None, FineTuningResult(kept=False, reason="disabled by few_shot.fine_tuning.epochs = 0")
    if inputs is None:
        reason = f"not tried: the inputs of the last stage exceed {config.max_gib:g} GiB"
        return None, FineTuningResult(kept=False, reason=reason)
    device = next(chosen.network.parameters()).device
    tail = cut_before_last_stage(chosen.network, inputs[:4, 0].to(device), vectors[:4, 0].to(device))
    if tail is None:
        reason = "not tried: this network has no separable last stage"
        return None, FineTuningResult(kept=False, reason=reason)
    data = StageData(
        inputs,
        torch.from_numpy(problem.targets).float(),
        torch.from_numpy(problem.weights).float(),
        problem.activation,
    )

    def trainer(start: LinearHead, fitted: NDArray[np.intp]) -> LastStageTrainer:
        return LastStageTrainer(tail, start, data, fitted, config, seed)

    folds_N = make_folds(features, targets, config.folds, seed)
    curve_ENC = cross_validate_epochs(problem, folds_N, trainer, config, on)
    after_NC, result = decide(problem, folds_N, curve_ENC)
    if not result.kept:
        return None, result
    final = trainer(head, np.arange(len(folds_N)))
    for epoch in range(result.epochs):
        on("fine-tuning on all images", epoch, result.epochs)
        final.train_epoch()
    copy_tail(final.model, chosen.network)
    return after_NC, result


def cross_validate_epochs(
    problem: HeadProblem,
    folds_N: NDArray[np.intp],
    trainer: Trainer,
    config: FineTuningConfig,
    on: Progress,
) -> Array:
    """Fine-tune without each fold in turn, all of them epoch by epoch.

    Returns the logits (E, N, C) out of fold after 0, 1, ... epochs, the first being those of the head alone.
    It stops `patience` epochs after the smallest loss.
    """
    estimate, images = cross_validate(problem, folds_N), np.arange(len(folds_N))
    trainers = []
    for fold, l2 in enumerate(estimate.l2_of_fold):
        fitted = images[folds_N != fold]
        trainers.append((trainer(problem.linear(problem.fit(fitted, l2)), fitted), images[folds_N == fold]))
    curve = [estimate.logits]
    totals = [float(problem.losses(estimate.logits, images).sum())]
    for epoch in range(config.epochs):
        logits = np.zeros_like(estimate.logits)
        for number, (one, tested) in enumerate(trainers):
            done, total = epoch * len(trainers) + number, config.epochs * len(trainers)
            on("cross-validation of fine-tuning", done, total)
            one.train_epoch()
            logits[tested] = one.logits(tested)
        curve.append(logits)
        totals.append(float(problem.losses(logits, images).sum()))
        if len(totals) - 1 - int(np.argmin(totals)) >= config.patience:
            break
    return np.stack(curve)


def decide(
    problem: HeadProblem, folds_N: NDArray[np.intp], curve_ENC: Array
) -> tuple[Array, FineTuningResult]:
    """Decide whether fine-tuning pays; returns the logits (N, C) after it and the decision.

    The epochs of a fold are those with the smallest loss on the other folds, those of the final network
    have the smallest loss on all. It is kept if more images are right and the mean loss is smaller.
    """
    images = np.arange(len(folds_N))
    losses_EN = problem.losses(curve_ENC, images)
    epochs, chosen_N = int(losses_EN.sum(axis=1).argmin()), np.zeros(len(folds_N), np.intp)
    for fold in range(int(folds_N.max()) + 1):
        chosen_N[folds_N == fold] = losses_EN[:, folds_N != fold].sum(axis=1).argmin()
    after_NC = curve_ENC[chosen_N, images]
    before, after = (
        float(correct(logits, problem.targets, problem.activation).mean())
        for logits in (curve_ENC[0], after_NC)
    )
    loss_before, loss_after = float(losses_EN[0].mean()), float(losses_EN[chosen_N, images].mean())
    kept, reason = True, "more images are right and the loss is smaller"
    if epochs == 0 or after <= before:
        kept, reason = False, "not more images are right"
    elif loss_after >= loss_before:
        kept, reason = False, "the loss is not smaller"
    return after_NC, FineTuningResult(
        kept=kept,
        reason=reason,
        epochs=epochs,
        top1_before=before,
        top1_after=after,
        loss_before=loss_before,
        loss_after=loss_after,
    )
