"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate a linear discriminant and scale its logits so that their probabilities are right.
3. Fit the classifier to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.

The only checkpoints are those of the finished run. Letters: N images, K classes, M photographs of
other things, D length of the network's own vector.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.decision import Decision, sigmoid
from sopdeploy.data.photos.file_checks import describe_contradictions
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.evaluation.decision_fit import (
    explain_missing_threshold,
    fit_decision,
    fit_thresholds,
)
from sopdeploy.evaluation.label_doubts import describe_unjudged, find_label_doubts
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.evaluation.prediction import (
    HeldOutMetrics,
    held_out_metrics,
    predict_unknown,
)
from sopdeploy.models.second_order_head import PooledHead, SecondOrderHead, head_name
from sopdeploy.training.callback import Callback, ExpectedTime
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import (
    SignalState,
    TrainingStoppedError,
    handle_signals,
)
from sopdeploy.training.division import recorded_sample
from sopdeploy.training.few_shot.cross_validation import (
    CrossValidation,
    cross_validate,
    select_typical,
)
from sopdeploy.training.few_shot.description import describe_run
from sopdeploy.training.few_shot.features import build_fitted
from sopdeploy.training.few_shot.held_out import (
    HeldOutOutputs,
    find_shown_in_training,
    predict_held_out,
)
from sopdeploy.training.few_shot.other_things import read_other_things
from sopdeploy.training.few_shot.score import estimate_score
from sopdeploy.training.few_shot.state import (
    FewShotFit,
    last_few_shot_record,
    read_few_shot_fit,
)
from sopdeploy.training.few_shot.targets import Array, Targets, count_groups
from sopdeploy.training.procedure import LOOP_INSTEAD
from sopdeploy.training.records.checkpoints import Position, Setup, run_record
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.head import FeatureSettings, FittedKind, HeadOptions
from sopdeploy.weights.checkpoint import Checkpoint


def fit_few_shot(
    setup: Setup, last: Checkpoint | None, folder: RunFolder, callback: Callback
) -> tuple[FewShotFit, Mapping[str, Any]]:
    """Fit a classifier to the training images; write `best.pt`, the history, and `last.pt` of a new run.

    *last* is the checkpoint of a finished run, which is not trained again; None begins a new one.
    The decision is fitted to the out-of-fold predictions. Held-out images, if there are any, are
    used only for the score. Returns the fit and the entry `training` of `best.pt`. Raises
    `TrainingStoppedError` after a stop signal, and `DataError` for images that cannot be used.
    """
    if last is None:
        fit = fit_new(setup, callback)
        folder.save_last(last_few_shot_record(setup, fit))
    else:
        # The recipe's `rejection` may have changed since the run, so the decision is made again.
        fit = read_few_shot_fit(setup, last, folder.last)
        fit = with_decision(setup, fit)

    best = run_record(_record_answers(setup, fit), fit)
    history = fit.position.history
    folder.save_best(best)
    folder.save_history(history)
    if last is None:
        callback.on_epoch_end(history[-1])
    return fit, best.training


def _record_answers(setup: Setup, fit: FewShotFit) -> Setup:
    """Record in the origin of *setup* what the cross-validation of *fit* answered for a server's random sample.

    The classifiers that judge a class whose images are one group have not learned the class. Such an
    answer is -1, as `Origin` says.
    """
    images = setup.data.train
    sampled = recorded_sample(images)
    if setup.origin is None or images.is_multi_label or not sampled:
        return setup

    targets = images.targets.astype(np.int64)
    is_one_group_K = count_groups(Targets.of(images).classes, fit.groups) == 1
    answers_N = np.where(is_one_group_K[targets], -1, fit.logits.argmax(axis=1))
    hashes = fit.file_hashes[sampled].tolist()
    pairs = tuple(sorted(dict(zip(hashes, answers_N[sampled].tolist(), strict=True)).items()))
    return replace(setup, origin=setup.origin.model_copy(update={"out_of_fold": pairs}))


def fit_new(setup: Setup, callback: Callback) -> FewShotFit:
    """Fit and evaluate the network of a new run; writes no file but entries of the cache of features.

    Raises `TrainingStoppedError` after a stop signal, and `DataError` for images that cannot be
    used.
    """
    since = time.monotonic()
    with _before_first_checkpoint(setup) as signals:
        # The network with the head of all images, and its score.
        options = setup.recipe.head_options
        validation = _cross_validate(setup, callback, signals, options)
        network = _fit_all(setup, validation)
        logits_MK, seen = _predict_unseen(setup, validation, network, callback)
        setup = setup.without_seen(seen)
        score, metrics = _evaluate(setup, validation, logits_MK)

        label_logits, is_doubted_N = _doubt_labels(validation, setup.data.train, callback)
        signals.exchange()  # for a signal since the last progress

    seconds = time.monotonic() - since
    targets = validation.problem.targets
    losses = {"loss": float(targets.losses(validation.shifted_logits).mean())}
    row = EpochRow(epoch=1, lr=0.0, losses=losses, metrics=metrics, seconds=seconds)

    fit = FewShotFit(
        name=head_name(setup.recipe.model.name),
        network=network,
        position=Position(epoch=1, seconds=seconds, history=(row,)),
        file_hashes=validation.features.file_hashes,
        result=describe_run(setup, validation, score, is_doubted_N, label_logits),
        logits=validation.shifted_logits,
        groups=validation.groups,
        copies=validation.copies,
        judged=validation.judged,
        label_logits=label_logits,
        left_out=validation.left_out,
        seen=seen,
    )
    return with_decision(setup, fit)


def fit_start(setup: Setup, callback: Callback, head: FittedKind) -> PooledHead:
    """Fit the *head* from which the training of the network of *setup*, or of its branch, begins.

    It is shrunk until it no longer interpolates the training images. Its features are those that
    `fit_new` has put into the cache. Raises `TrainingStoppedError` after a stop signal.
    """
    options = setup.recipe.head_options.model_copy(update={"head": head})
    with _before_first_checkpoint(setup) as signals:
        validation = _cross_validate(setup, callback, signals, options)
        problem, scaling = validation.problem.shrink_to_learn(validation.all_folds)
        return build_fitted(
            validation.outputs.network,
            validation.features.head,
            problem,
            problem.fit_all(scaling),
            setup.recipe.part(FeatureSettings),
        ).pooled_head


@contextmanager
def _before_first_checkpoint(setup: Setup) -> Iterator[SignalState]:
    """Handle stop signals; the error of one says that there is no checkpoint yet."""
    with handle_signals(setup.strategy) as signals:
        try:
            yield signals
        except TrainingStoppedError as stop:
            stop.message = "stopped before the first checkpoint; start the same command again"
            raise


def _cross_validate(
    setup: Setup, callback: Callback, signals: SignalState, options: HeadOptions
) -> CrossValidation:
    """Cross-validate heads of *options* on the training images.

    Tells *callback* the progress, and raises after one of *signals*.
    """
    images = setup.data.train
    expected = ExpectedTime(callback, LOOP_INSTEAD)

    def on_progress(step: str, done: int, total: int) -> None:
        callback.on_stage(name=step, done=done, total=total)
        # Only the features count for the expected time: they take most of it.
        expected.update(min(done, len(images)), len(images))
        signals.exchange()  # raises `TrainingStoppedError` after a stop signal

    return cross_validate(
        setup.recipe.part(FeatureSettings),
        options,
        setup.model,
        images,
        on_progress,
        groups_by_name=setup.recipe.groups_by_name,
    )


def _fit_all(setup: Setup, validation: CrossValidation) -> SecondOrderHead:
    """Fit the head to all training images; return the network with it."""
    problem = validation.problem
    return build_fitted(
        validation.outputs.network,
        validation.features.head,
        problem,
        problem.fit_all(validation.scaling),
        setup.recipe.part(FeatureSettings),
    )


def _predict_unseen(
    setup: Setup, validation: CrossValidation, network: SecondOrderHead, callback: Callback
) -> tuple[Array | None, NDArray[np.bool_] | None]:
    """Return logits of the held-out images that training images do not show, and which (M,) they show.

    Both are None without held-out images, and the logits also if `Setup.without_seen` leaves none.
    """
    if not len(setup.data.held_out):
        return None, None

    outputs = predict_held_out(validation.outputs, network, setup.data.held_out)
    seen = _find_seen(setup, validation, outputs, callback)
    has_others = len(setup.without_seen(seen).data.held_out) > 0
    return outputs.logits[~seen] if has_others else None, seen


def _doubt_labels(
    validation: CrossValidation, images: LabeledImages, callback: Callback
) -> tuple[Array | None, NDArray[np.bool_]]:
    """Return the logits that judge the labels of *images*, (N, K), and which labels are doubted, (N,).

    Only labels of one class per image are judged. It warns of labels that contradict each other,
    and of those that cannot be judged.
    """
    # `set_up_run` has warned already if it knows the files; each warning is told once.
    contradictions = describe_contradictions(images, validation.features.file_hashes)
    if contradictions:
        callback.on_warning(contradictions)

    if validation.problem.targets.activation != "softmax":
        return None, np.zeros(len(images), np.bool_)

    label_logits = _judge_labels(validation)
    labels = images.targets.astype(np.int64)
    doubts = find_label_doubts(label_logits, labels, validation.copies)
    if unjudged := describe_unjudged(doubts):
        callback.on_warning(unjudged)
    return label_logits, doubts.listed


def _judge_labels(validation: CrossValidation) -> Array:
    """Compute the out-of-fold logits (N, K) that contradict wrong labels, without margins.

    With its margin, a class of few photographs would contradict no label.
    """
    scaling = validation.scaling
    logits_NK = validation.logits + scaling.margins / scaling.temperature
    return validation.problem.logits_without_doubted(
        logits_NK, validation.folds, scaling._replace(margins=0.0)
    )


def _evaluate(
    setup: Setup, validation: CrossValidation, logits_MK: Array | None
) -> tuple[Rate | MeanPrecision | None, HeldOutMetrics]:
    """Return the score and the metrics of held-out images by *logits_MK*, or else of the cross-validation."""
    if logits_MK is not None:
        held_out = setup.data.held_out
        # Without groups, each image is independent of the others.
        groups = np.arange(len(held_out)) if held_out.groups is None else held_out.groups
        targets = Targets.of(held_out)
        held_out_score = estimate_score(
            targets.classes, targets.activation, logits_MK, setup.recipe.seed, groups
        )
        metrics = held_out_metrics(setup.labels, logits_MK, held_out.targets)
        return held_out_score, metrics

    # The metrics are those of the images that the score counts; of all if there is no score.
    # The shift of the logits is equal for all classes of an image and changes no metric.
    score = validation.score()
    images = setup.data.train
    counted = np.arange(len(images)) if score is None else validation.judged
    metrics = held_out_metrics(
        setup.labels, validation.shifted_logits[counted], images.targets[counted]
    )
    return score, metrics


def _find_seen(
    setup: Setup, validation: CrossValidation, outputs: HeldOutOutputs, callback: Callback
) -> NDArray[np.bool_]:
    """Tell which held-out images (M,) training images show, too, by their *outputs*, and warn of them."""
    held_out = setup.data.held_out
    seen = find_shown_in_training(
        setup.data.train,
        validation.features,
        held_out,
        outputs,
        with_copies=setup.recipe.head_options.group_copies,
    )
    if seen.any():
        judged = setup.without_seen(seen).data.held_out
        consequence = "they are not judged"
        if not len(judged):
            consequence = "the accuracy is cross-validated on the training images"
        callback.on_warning(
            f"{int(seen.sum())} of {len(held_out)} validation images are training images or copies "
            f"of them, so {consequence}; `sopdeploy train --data FOLDER --dry-run` lists them"
        )
    return seen


def with_decision(setup: Setup, fit: FewShotFit) -> FewShotFit:
    """Return *fit* with the decision for its out-of-fold logits.

    With one class per image, those of images that a server kept do not count (`select_typical`),
    and the result also tells why there is no threshold for unknown images.
    """
    recipe = setup.recipe
    targets = setup.data.train.targets
    accepts = recipe.rejection.accepts
    if setup.activation == "sigmoid":
        thresholds = fit_thresholds(targets, sigmoid(fit.logits))
        return replace(fit, decision=Decision(activation="sigmoid", thresholds=thresholds))

    # What tests the threshold: the user's folder, or what comes with the network.
    unknown = predict_unknown(fit.network, setup.unknown, recipe.preprocess, recipe.workers)
    is_shipped = unknown is None
    if unknown is None:
        unknown = _predict_other_things(setup, fit)

    # The decision, and why there is no threshold.
    typical_N = select_typical(setup.data.train)
    decision = fit_decision(
        fit.logits[typical_N],
        targets[typical_N].astype(np.int64),
        estimated_on="cross-validation",
        accepts=accepts,
        scalable=False,  # the network contains the temperature
        groups=fit.groups[typical_N],
        unknown=unknown,
        is_unknown_shipped=is_shipped,
        left_out=None if fit.left_out is None else fit.left_out[typical_N],
        are_cosines=True,
    )
    num_typical_groups = len(np.unique(fit.groups[typical_N]))
    why_no_threshold = explain_missing_threshold(
        num_typical_groups, fit.logits.shape[1], accepts
    )

    is_nothing_fitted = decision == Decision()
    result: Any = fit.result
    return replace(
        fit,
        result=result.model_copy(update={"unknown": why_no_threshold}),
        decision=None if is_nothing_fitted else decision,
    )


def _predict_other_things(setup: Setup, fit: FewShotFit) -> Array | None:
    """Return logits (M, K) with the energies of photographs of other things; None without such photographs."""
    network: Any = fit.network
    vectors = read_other_things(network, setup.weights, setup.recipe.preprocess)
    if vectors is None:
        return None
    means_KD = network.pooled_head.means.cpu().numpy()
    cosines_M1 = (vectors @ means_KD.T).max(axis=1, keepdims=True)
    # The log-sum-exp of K equal logits exceeds them by log K, which is subtracted.
    num_classes = len(means_KD)
    logits_M1 = cosines_M1.astype(np.float64) - np.log(num_classes)
    return np.repeat(logits_M1, num_classes, axis=1)
