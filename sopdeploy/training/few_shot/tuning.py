"""Fine-tuning: cross-validation of the number of epochs, and the decision whether it is better than the head.

The ways of fine-tuning are: plain, with the branches of DSoP that read the last stage, and with a GSoP block
at the end of that stage. All are compared with the head alone on the same folds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.training.few_shot.config import CandidateResult, FewShotConfig, FineTuningConfig
from sopdeploy.training.few_shot.estimates import Targets, choose, choose_by_fold, shortcoming
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.few_shot.head import Array, HeadEstimate, HeadProblem, LinearHead, cross_validate
from sopdeploy.training.few_shot.heads import FittedHead, make_folds
from sopdeploy.training.few_shot.last_stage import LastStageTrainer, StageData
from sopdeploy.training.few_shot.tails import Tail, copy_tail, make_tails
from sopdeploy.training.recipe import Recipe

Progress = Callable[[str, int, int], None]  # name of the step, done, total
Trainer = Callable[[LinearHead, NDArray[np.intp]], LastStageTrainer]


class TunedTail(NamedTuple):
    """A way of fine-tuning with its out-of-fold `logits` (N, C) and its number of epochs."""

    tail: Tail
    logits: Array
    epochs: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """The result of fine-tuning.

    `kept` is the chosen way of fine-tuning, and `logits` (N, C) are its out-of-fold logits; both are `None`
    if the head alone is better.
    """

    results: tuple[CandidateResult, ...]
    kept: TunedTail | None = None
    logits: Array | None = None


def fine_tune(
    recipe: Recipe, chosen: FittedHead, features: Features, targets: Targets, on: Progress
) -> Tuning:
    """Fine-tune the last stage of the network of *chosen* if cross-validation shows a gain.

    The fine-tuned weights are then in `kept.tail.network` of the result.
    """
    config, seed = (recipe.few_shot or FewShotConfig()).fine_tuning, recipe.seed
    vectors, inputs = features.vectors[chosen.index], features.stage_inputs
    if config.epochs == 0:
        return _not_tried("disabled by few_shot.fine_tuning.epochs = 0")
    if inputs is None:
        return _not_tried(f"not tried: the inputs of the last stage exceed {config.max_gib:g} GiB")
    device = next(chosen.network.parameters()).device
    few = inputs[:4, 0].to(device), vectors[:4, 0].to(device)
    tails = make_tails(recipe.model.name, chosen.network, *few, config, seed)
    if not tails:
        return _not_tried("not tried: this network has no separable last stage")
    classes, weights = torch.from_numpy(targets.classes).float(), torch.from_numpy(targets.weights).float()
    data = StageData(inputs, classes, weights, targets.activation)
    folds_N = make_folds(features, targets, config.folds, seed)
    alone, tuned = cross_validate(chosen.problem, folds_N), []
    for tail in tails:
        trainer = partial(LastStageTrainer, tail, data=data, config=config, seed=seed)
        on_part = partial(on, f"cross-validation of {tail.name}")
        curve_ENC = cross_validate_epochs(chosen.problem, targets, alone, folds_N, trainer, config, on_part)
        tuned.append(TunedTail(tail, *choose_epochs(targets, folds_N, curve_ENC)))
    tuning = decide(targets, folds_N, alone.logits, tuned, seed)
    if tuning.kept is not None:
        kept, images = tuning.kept, np.arange(len(folds_N))
        head = chosen.problem.linear(chosen.problem.fit(images, chosen.estimate.l2))
        final = LastStageTrainer(kept.tail, head, images, data, config, seed)
        for epoch in range(kept.epochs):
            on("fine-tuning on all images", epoch, kept.epochs)
            final.train_epoch()
        copy_tail(final.model, kept.tail.network)
    return tuning


def _not_tried(reason: str) -> Tuning:
    return Tuning((CandidateResult(name="fine-tuning", kept=False, reason=reason),))


def cross_validate_epochs(
    problem: HeadProblem,
    targets: Targets,
    alone: HeadEstimate,
    folds_N: NDArray[np.intp],
    trainer: Trainer,
    config: FineTuningConfig,
    on_part: Callable[[int, int], None],
) -> Array:
    """Fine-tune one network per left-out fold and record the out-of-fold logits after every epoch.

    Returns the out-of-fold logits (E, N, C) after 0, 1, ... epochs; those after 0 epochs belong to the head
    *alone*. Training stops `patience` epochs after the smallest loss, or if it diverges.
    """
    images = np.arange(len(folds_N))
    trainers = []
    for fold, l2 in enumerate(alone.l2_of_fold):
        fitted = images[folds_N != fold]
        trainers.append((trainer(problem.linear(problem.fit(fitted, l2)), fitted), images[folds_N == fold]))
    curve = [alone.logits]
    totals = [float(targets.losses(alone.logits).sum())]
    for epoch in range(config.epochs):
        logits = np.zeros_like(alone.logits)
        for number, (one, tested) in enumerate(trainers):
            on_part(epoch * len(trainers) + number, config.epochs * len(trainers))
            one.train_epoch()
            logits[tested] = one.logits(tested)
        if not np.isfinite(logits).all():
            break
        curve.append(logits)
        totals.append(float(targets.losses(logits).sum()))
        if len(totals) - 1 - int(np.argmin(totals)) >= config.patience:
            break
    return np.stack(curve)


def choose_epochs(targets: Targets, folds_N: NDArray[np.intp], curve_ENC: Array) -> tuple[Array, int]:
    """Choose the number of epochs; returns the out-of-fold logits (N, C) and the chosen number.

    The logits of a fold are those after the number of epochs with the smallest loss on the other folds. The
    returned number, which the final network uses, has the smallest loss on all folds.
    """
    losses_EN = np.stack([targets.losses(logits) for logits in curve_ENC])
    chosen_N = np.zeros(len(folds_N), np.intp)
    for fold in range(int(folds_N.max()) + 1):
        chosen_N[folds_N == fold] = losses_EN[:, folds_N != fold].sum(axis=1).argmin()
    return curve_ENC[chosen_N, np.arange(len(folds_N))], int(losses_EN.sum(axis=1).argmin())


def decide(
    targets: Targets,
    folds_N: NDArray[np.intp],
    before_NC: Array,
    tuned: list[TunedTail],
    seed: int,
) -> Tuning:
    """Decide which of *tuned*, if any, replaces the head alone, whose out-of-fold logits are *before_NC*.

    The returned logits of a fold are those of the way that is best on the other folds.
    """
    images = np.arange(len(folds_N))
    usable = [one if one.epochs else TunedTail(one.tail, before_NC, 0) for one in tuned]
    candidates = [before_NC, *(one.logits for one in usable)]
    best = choose(targets, candidates, images)
    before, loss_before = targets.score(before_NC, images), float(targets.losses(before_NC).mean())
    results = []
    for number, one in enumerate(usable, 1):
        reason = shortcoming(targets, one.logits, before_NC, images)
        results.append(
            CandidateResult(
                name=one.tail.name,
                kept=number == best,
                reason=reason or ("smallest loss" if number == best else "another way has a smaller loss"),
                score=targets.estimate(one.logits, seed),
                loss=float(targets.losses(one.logits).mean()),
                score_before=before,
                loss_before=loss_before,
                epochs=one.epochs,
            )
        )
    if best == 0:
        return Tuning(tuple(results))
    composed = choose_by_fold(targets, candidates, folds_N)
    return Tuning(tuple(results), usable[best - 1], composed)
