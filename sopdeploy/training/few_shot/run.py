"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate a linear classifier and choose the strength of its regularization.
3. Fit the classifier to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.

The only checkpoints are those of the finished run. Letters: N images, K classes.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sopdeploy.data.base import (
    LabeledImages,
    PreprocessedDataset,
    Split,
    derive_seed,
    unreadable_images_error,
)
from sopdeploy.data.near import connect
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.errors import DataError
from sopdeploy.evaluation.decision_fit import fit_decision, fit_thresholds, missing_threshold
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.prediction import HeldOutMetrics, held_out_metrics, predict_logits, predict_unknown
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import TrainingStoppedError, handle_signals
from sopdeploy.training.few_shot.classifier import GRID, Indices, Problem, Targets, estimate, shift_energies
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.results import FewShotResult
from sopdeploy.training.run import Callback, Position, Run
from sopdeploy.training.run_folder import RunFolder

# Below this number of groups, the energies are the means of three cross-validations. The threshold is one of
# the lowest energies, which other folds change: for 100 photographs of clothing, five seeds rejected 58 to
# 75 % of unknown images with one cross-validation and 64 to 70 % with three.
FEW_GROUPS = 200


def fit_few_shot(run: Run, data: Split, folder: RunFolder, callback: Callback) -> None:
    """Fit a classifier to the training images of *data* and write `best.pt`, `last.pt` and the history.

    A finished run is not trained again. The decision is fitted to the out-of-fold predictions. Held-out
    images, if there are any, are used only for the score. Raises `TrainingStoppedError` after a stop signal,
    and `DataError` for images that cannot be used.
    """
    if isinstance(run.result, FewShotResult):
        _fit_decision(run, data.train, run.result)  # `rejection` may have changed
        folder.save_best(run)
        return
    since = time.monotonic()
    with handle_signals(run.strategy) as signals:

        def on_progress(step: str, done: int, total: int) -> None:
            callback.on_stage(name=step, done=done, total=total)
            signals.exchange()

        try:
            result = fit_classifier(run, data.train, on_progress)
            result, metrics = _evaluate(run, data, result)
        except TrainingStoppedError as stop:
            stop.message = "stopped before the first checkpoint; start the same command again"
            raise
        except DataError as error:
            raise unreadable_images_error(error, data.train, data.held_out) from None
    _fit_decision(run, data.train, result)
    seconds = time.monotonic() - since
    targets = Targets.of(data.train)
    # The weights of the classes are for the fit only: the history shows the mean loss of all training images.
    unweighted_N = targets.losses(run.state["out_of_fold"].numpy()) / targets.weights
    losses = {"loss": float(unweighted_N.mean())}
    row = EpochRow(epoch=1, lr=run.recipe.optimizer.lr, losses=losses, metrics=metrics, seconds=seconds)
    run.position = Position(epoch=1, seconds=seconds, history=(row,))
    folder.save_last(run)
    folder.save_derived_files(run)
    callback.on_epoch_end(row)


def fit_classifier(
    run: Run, images: LabeledImages, on_progress: Callable[[str, int, int], None]
) -> FewShotResult:
    """Fit the classifier to *images* and cross-validate it; `run.model` becomes the fitted network.

    `run.state` becomes what the decision and the report need: `out_of_fold` logits (N, K), `groups` (N,) of
    copies, the indices `judged` of the images that the score counts, and, with one class per image, the
    `label_logits` (N, K) that contradict wrong labels, with the `targets` (N,) and `file_hashes` (N,) that
    they belong to. *on_progress* receives (step, done, total). Raises `DataError` if all images are one group
    of copies.
    """
    config: Any = run.recipe.procedure
    name, count = run.recipe.model.name, len(images)
    started = time.monotonic()
    features = Features(
        run.recipe,
        config.head,
        run.model,
        images,
        lambda done, _total: on_progress(f"features of {name}", done, 2 * count),  # half of the work
    )
    pairs = features.find_copies(images) if config.group_copies else np.zeros((2, 0), np.intp)
    groups_N = connect(count, pairs, features.hashes, images.groups)
    copies_N = connect(count, pairs, features.hashes)  # groups of copies, without the given groups
    judged = _largest_copies(images, copies_N)
    features_done = time.monotonic()
    on_progress("cross-validation", count, 2 * count)
    targets = Targets.of(images)
    _, first_image_G = np.unique(groups_N, return_index=True)  # its hash is the key of the whole group
    keys_N = [features.hashes[image] for image in first_image_G[groups_N].tolist()]
    folds_of_validations = _make_folds(targets, keys_N, config.folds, run.recipe.seed)
    parts = [features.vectors[:, columns] for columns in features.columns(features.head)]
    problem = Problem.create(parts, targets)
    validations = [problem.out_of_fold(folds_N) for folds_N in folds_of_validations]
    folds_N, logits_NK = folds_of_validations[0], validations[0].logits  # the others count only in means
    mean_losses_G = np.mean([one.losses for one in validations], axis=0)  # for each C of `GRID`
    strength = GRID[int(mean_losses_G.argmin())]
    distance_weights = [problem.distance_weight(one.logits, one.distances) for one in validations]
    distance_weight = float(np.mean(distance_weights))
    shifted_NK = shift_energies(validations, distance_weight)
    choice_done = time.monotonic()
    seconds = {"features": round(features_done - started, 3), "choice": round(choice_done - features_done, 3)}
    classes, num_folds = targets.classes[judged], int(folds_N.max()) + 1
    score = estimate(
        classes, targets.activation, logits_NK[judged], run.recipe.seed, groups_N[judged], num_folds
    )
    taps = f" of {', '.join(features.head.taps)}" if features.head.taps else ""
    result = FewShotResult(
        **{"top1" if isinstance(score, Rate) else "map": score},
        estimated_on="cross-validation",
        class_counts=dict(zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)),
        balanced=targets.balanced,
        num_images=count,
        num_duplicates=count - len(set(features.hashes)),
        **_describe_groups(images, targets, groups_N),
        head=f"{name} {features.head.kind}{taps}",
        num_features=len(problem.center),
        strength=strength,
        seconds=seconds,
    )
    run.replace_model(head_name(name), features.build(problem, problem.fit_all(strength), distance_weight))
    run.state = {
        "out_of_fold": torch.from_numpy(shifted_NK),
        "groups": torch.from_numpy(groups_N),
        "judged": torch.from_numpy(judged),
    }
    if targets.activation == "softmax":
        label_logits_NK = problem.doubt_labels(logits_NK, folds_N, strength)
        run.state["label_logits"] = torch.from_numpy(label_logits_NK)
        run.state["targets"] = torch.from_numpy(images.targets)
        run.state["file_hashes"] = run.file_hashes
    return result


def _make_folds(targets: Targets, keys_N: list[str], at_most: int, seed: int) -> list[Indices]:
    """Assign images to folds (N,): for one cross-validation, or three below `FEW_GROUPS` different keys."""
    seeds = [derive_seed(seed, "folds")]
    if targets.activation == "softmax" and len(set(keys_N)) < FEW_GROUPS:
        seeds += [derive_seed(seed, "folds", attempt) for attempt in (1, 2)]
    return [targets.folds(keys_N, at_most, of_attempt) for of_attempt in seeds]


def _largest_copies(images: LabeledImages, copies_N: Indices) -> Indices:
    """Return the index of the least cropped image, that with the most pixels, of each group of *copies_N*."""
    _, largest_G = np.unique(copies_N, return_index=True)  # the first image of each group, often its only one
    for group in np.flatnonzero(np.bincount(copies_N) > 1):  # only the images of these groups are opened
        members = np.flatnonzero(copies_N == group)
        num_pixels = [np.prod(images[index][0].size) for index in members.tolist()]
        largest_G[group] = members[np.argmax(num_pixels)]
    return largest_G


def _describe_groups(images: LabeledImages, targets: Targets, groups_N: Indices) -> dict[str, Any]:
    """Return the fields of `FewShotResult` about the groups of copies *groups_N*."""
    groups_of_class = {
        label: set(groups_N[of_class > 0].tolist())
        for label, of_class in zip(images.labels, targets.classes.T, strict=True)
    }
    contradictions = tuple(
        " = ".join(images.identity(index) for index in indices.tolist())
        for indices in targets.contradictions(groups_N)  # of the images of each group with different classes
    )
    return {
        "num_groups": int(groups_N.max()) + 1,
        "one_group": tuple(label for label, groups in groups_of_class.items() if len(groups) == 1),
        "contradictions": contradictions,
    }


def _evaluate(run: Run, data: Split, result: FewShotResult) -> tuple[FewShotResult, HeldOutMetrics]:
    """Return *result* with the score to report, and the metrics of the same predictions.

    These are predictions for the held-out images, or else those of the cross-validation, whose score *result*
    has already.
    """
    recipe, images = run.recipe, data.held_out
    if not len(images):
        judged = run.state["judged"].numpy()  # indices: of copies of a photograph, only one is counted
        logits_NK = run.state["out_of_fold"].numpy()[judged]
        return result, held_out_metrics(run.labels, logits_NK, data.train.targets[judged])
    dataset = PreprocessedDataset(images, recipe.preprocess)
    logits_NK, targets = predict_logits(
        run.model, dataset, recipe.preprocess, batch_size=recipe.batch_size, workers=recipe.workers
    )
    groups_N = np.arange(len(images)) if images.groups is None else images.groups
    expected = Targets.of(images)
    score = estimate(expected.classes, expected.activation, logits_NK, recipe.seed, groups_N)
    field = "top1" if isinstance(score, Rate) else "map"
    result = result.model_copy(update={field: score, "estimated_on": "held-out"})
    return result, held_out_metrics(run.labels, logits_NK, targets)


def _fit_decision(run: Run, images: LabeledImages, result: FewShotResult) -> None:
    """Set `run.decision`, fitted to the out-of-fold logits of *images*, and `run.result`.

    The latter is *result*, with the reason if there is no threshold for unknown images.
    """
    logits, groups = run.state["out_of_fold"].double().numpy(), run.state["groups"].numpy()
    recipe, accepts = run.recipe, run.recipe.rejection.accepts
    if run.activation == "sigmoid":
        thresholds = fit_thresholds(images.targets, sigmoid(logits))
        run.decision = Decision(activation="sigmoid", thresholds=thresholds)
    else:
        reason = missing_threshold(result.num_groups, logits.shape[1], accepts)
        result = result.model_copy(update={"unknown": reason})
        decision = fit_decision(
            logits,
            images.targets.astype(np.int64),
            estimated_on="cross-validation",
            accepts=accepts,
            scalable=False,  # heads that saw fewer images are less certain than the final one
            groups=groups,
            unknown=predict_unknown(run.model, recipe.rejection.unknown, recipe.preprocess, recipe.workers),
        )
        run.decision = None if decision == Decision() else decision  # None: nothing was fitted
    run.result = result
