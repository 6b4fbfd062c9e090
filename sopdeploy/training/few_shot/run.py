"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate a linear discriminant and scale its logits so that their probabilities are right.
3. Fit the classifier to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.

The only checkpoints are those of the finished run. Letters: N images, K classes, G groups, M
photographs of other things, D length of the network's own vector.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.evaluation.decision_fit import (
    MIN_COSINES,
    fit_decision,
    fit_thresholds,
    missing_threshold,
)
from sopdeploy.evaluation.label_doubts import find_label_doubts
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.evaluation.prediction import (
    HeldOutMetrics,
    held_out_metrics,
    predict_logits,
    predict_unknown,
)
from sopdeploy.models.base import Classifier
from sopdeploy.models.second_order_head import SecondOrderHead, head_name
from sopdeploy.photos.clips import Clips, clips_of_images
from sopdeploy.photos.copies import (
    NO_PAIRS,
    NearDuplicates,
    connect,
    find_near_duplicates,
    number_classes,
)
from sopdeploy.photos.files import is_kept_photograph
from sopdeploy.photos.network_inputs import PreprocessedDataset
from sopdeploy.photos.photo import LabeledImages
from sopdeploy.seeds import derive_seed
from sopdeploy.training.callback import Callback, ExpectedTime
from sopdeploy.training.checkpoints import Position, RunFolder, Setup, run_record
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import TrainingStoppedError, handle_signals
from sopdeploy.training.few_shot.classifier import (
    ENOUGH,
    Array,
    Indices,
    LinearProblem,
    Scaling,
    Targets,
    estimate_score,
)
from sopdeploy.training.few_shot.features import (
    CachedNetwork,
    Features,
    build_fitted,
    compute_features,
    full_head,
)
from sopdeploy.training.few_shot.learning import estimate_gains
from sopdeploy.training.few_shot.other_things import read_other_things
from sopdeploy.training.few_shot.state import (
    FewShotFit,
    last_few_shot_record,
    read_few_shot_fit,
)
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.results import FewShotResult
from sopdeploy.training.setup import LOOP_INSTEAD, warn_of_equal_files

# Below this number of groups, temperature and cosines come from three cross-validations: the
# threshold is one of the lowest cosines, which other folds change.
FEW_GROUPS = 200
# Weight in the class means of photographs that a server kept. With 1, these atypical ones and
# their wrong labels move the means: of one set, 83 instead of 93 % of the foreign photographs
# were rejected, with 1/8 93 % (docs/benchmarks/copied_photos.md).
KEPT_WEIGHT = 0.125
MAX_COPIES = 10  # of a photograph with different labels, all of which are named
# Share and number of the images of a class that chance takes for another one
CHANCE = 0.4
MIN_CONFUSED = 3
# ratio of the largest class to the smallest from which on the result says how it is corrected
UNEVEN = 1.5


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

    best = run_record(setup, fit)
    history = fit.position.history
    folder.save_best(best)
    folder.save_history(history)
    if last is None:
        callback.on_epoch_end(history[-1])
    return fit, best.training


def fit_new(setup: Setup, callback: Callback) -> FewShotFit:
    """Fit and evaluate the network of a new run; writes no file.

    Raises `TrainingStoppedError` after a stop signal, and `DataError` for images that cannot be
    used.
    """
    since = time.monotonic()
    recipe = setup.recipe

    images = setup.data.train
    with handle_signals(setup.strategy) as signals:
        expected = ExpectedTime(callback, LOOP_INSTEAD)

        def on_progress(step: str, done: int, total: int) -> None:
            callback.on_stage(name=step, done=done, total=total)
            # Only the features count for the expected time: they take most of it.
            expected.update(min(done, len(images)), len(images))
            signals.exchange()  # raises `TrainingStoppedError` after a stop signal

        try:
            found = cross_validate(recipe, setup.model, images, on_progress)
            # If the hashes of the files are known, `set_up_run` has warned already.
            if not len(setup.file_hashes):
                warn_of_equal_files(
                    images, setup.data.held_out, found.features.file_hashes, callback
                )

            # The network with the head of all images, and its score.
            problem = found.problem
            head = found.features.head
            network = build_fitted(
                found.network, head, problem, problem.fit_all(found.scaling), recipe
            )
            score, metrics = _evaluate(setup, network, found)

            # Labels are judged only with one class per image, and without margins: with its
            # margin, a class of few photographs would contradict no label.
            label_logits = None
            is_doubted_N = np.zeros(len(images), np.bool_)
            if problem.targets.activation == "softmax":
                plain = found.scaling._replace(margins=0.0)
                logits_NK = found.logits + found.scaling.margins / found.scaling.temperature
                label_logits = problem.logits_without_doubted(logits_NK, found.folds, plain)
                doubts = find_label_doubts(label_logits, images.targets.astype(np.int64))
                is_doubted_N = doubts.listed

            signals.exchange()  # for a signal since the last progress
        except TrainingStoppedError as stop:
            stop.message = "stopped before the first checkpoint; start the same command again"
            raise

    seconds = time.monotonic() - since
    losses = {"loss": float(problem.targets.losses(found.shifted_logits).mean())}
    row = EpochRow(epoch=1, lr=0.0, losses=losses, metrics=metrics, seconds=seconds)

    fit = FewShotFit(
        name=head_name(recipe.model.name),
        network=network,
        position=Position(epoch=1, seconds=seconds, history=(row,)),
        file_hashes=found.features.file_hashes,
        result=_describe(setup, found, score, is_doubted_N, label_logits),
        logits=found.shifted_logits,
        groups=found.groups,
        copies=found.copies,
        judged=found.judged,
        label_logits=label_logits,
        left_out=found.left_out,
    )
    return with_decision(setup, fit)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """The features of N images of K classes, and the out-of-fold predictions of linear classifiers on them.

    Attributes:
        network: The frozen network that computed the features, with a head on all statistics.
        problem: The linear problem of the features that the head reads, with the targets.
        groups: The group (N,) of each image: copies, clips, and images that the user groups.
        alike: Classes whose images look so much alike that only nearly equal ones are copies.
        clips: What was found about clips.
        copies: The photograph (N,) that each image shows; copies have the same.
        judged: The indices of the images that the score counts.
        folds, logits: The folds (N,) of the first cross-validation, and the logits (N, K) of images
            without their fold, or that of `judge_few_apart`.
        shifted_logits: `logits`, shifted as the deployed network does: the energy of an image is its cosine
            to the nearest class mean, on average over all cross-validations. With several classes per image,
            they are not shifted.
        left_out: The cosine (N,) of each image and the nearest mean of the other classes; None with several
            classes per image.
    """

    recipe: Recipe
    network: SecondOrderHead
    features: Features
    problem: LinearProblem
    groups: Indices
    alike: tuple[str, ...]
    clips: Clips
    copies: Indices
    judged: Indices
    folds: Indices
    logits: Array
    shifted_logits: Array
    left_out: Array | None
    scaling: Scaling
    seconds: dict[str, float]

    def score(self) -> Rate | MeanPrecision | None:
        """Estimate the score of the classifier by the images that count; None if all show one class."""
        targets = self.problem.targets
        if len(np.unique(targets.strata[self.judged])) < 2 and targets.activation == "softmax":
            return None
        classes = targets.classes[self.judged]
        num_folds = int(self.folds.max()) + 1
        logits = self.logits[self.judged]
        groups = self.groups[self.judged]
        return estimate_score(
            classes, targets.activation, logits, self.recipe.seed, groups, num_folds
        )


def cross_validate(
    recipe: Recipe,
    model: Classifier,
    images: LabeledImages,
    on_progress: Callable[[str, int, int], None],
) -> CrossValidation:
    """Cross-validate classifiers on the features of *images* by *model*, the network of *recipe*.

    *on_progress* receives (step, done, total). Raises `DataError` if all images are one group, such
    as a clip or copies of one photograph.
    """
    config: Any = recipe.procedure
    name = recipe.model.name
    count = len(images)
    targets = Targets.of(images)
    started = time.monotonic()

    # The features: half of the work.
    outputs = CachedNetwork(full_head(recipe, model), recipe)
    features = compute_features(
        outputs,
        config.head,
        images,
        lambda done, _total: on_progress(f"features of {name}", done, 2 * count),
    )

    # Groups of images that are not independent: near-duplicates, clips, and those that the user
    # groups.
    if config.group_copies:
        near = find_near_duplicates(
            features.views, features.small, images.targets, features.hashes
        )
    else:
        near = NearDuplicates(NO_PAIRS, np.zeros(count, np.bool_))
    clips = Clips(connect(count, NO_PAIRS, features.hashes, images.groups))
    if not recipe.groups_by_name:
        clips = clips_of_images(images, features.times, near.vectors, clips.groups)
    pairs = clips.select_pairs(near.pairs)  # without those that would join two clips

    # Groups by copies alone; groups by copies, clips and the user's groups together; and the
    # images that the score counts.
    copies_N = connect(count, pairs, features.hashes)
    groups_N = connect(count, NO_PAIRS, copies_N, clips.groups)
    judged = _choose_judged(images, targets, copies_N, groups_N)

    features_done = time.monotonic()
    on_progress("cross-validation", count, 2 * count)

    # The folds; the key of a group is the hash of its first image.
    _, first_image_G = np.unique(groups_N, return_index=True)
    keys_N = [features.hashes[image] for image in first_image_G[groups_N].tolist()]
    folds_of_validations = make_folds(targets, keys_N, config.folds, recipe.seed)
    # The folds of further validations count only in means.
    first_folds_N = folds_of_validations[0]

    # Predict each image by classifiers without its fold; if there are few groups, for several
    # divisions into folds.
    weights_N = weights_in_means(images)
    problem = LinearProblem(
        features.space, features.reduced, features.own, targets, weights_N, groups_N
    )
    validations = [problem.cross_validate(folds_N) for folds_N in folds_of_validations]
    scaling = Scaling.fit(validations, targets, has_margins=config.margins)

    # A classifier that lacks one of the two photographs of a small class assigns more images of
    # other classes to it than the deployed network, which learns from both. So the images of the
    # other classes are judged by classifiers that have all photographs of the small classes, which
    # get folds of their own.
    judging_folds_N = judge_few_apart(targets, first_folds_N, groups_N)
    judged_once = validations[0]
    if not np.array_equal(judging_folds_N, first_folds_N):
        judged_once = problem.cross_validate(judging_folds_N)
    logits_NK = problem.logits(judged_once, scaling)

    # The deployed network shifts the logits of an image so that their energy, the log-sum-exp, is
    # its cosine to the nearest class mean. After `log_softmax`, the energy is 0.
    shifted_NK = logits_NK
    left_out_N = None
    if targets.activation == "softmax":
        cosines_N = np.mean(
            [problem.cosines(folds_N) for folds_N in folds_of_validations], axis=0
        )
        shifted_NK = log_softmax(logits_NK, axis=1) + cosines_N[:, None]
        left_out_N = problem.cosines_without_class()

    seconds = {"features": features_done - started, "choice": time.monotonic() - features_done}

    return CrossValidation(
        recipe=recipe,
        network=outputs.network,
        features=features,
        problem=problem,
        copies=copies_N,
        groups=groups_N,
        alike=tuple(
            np.asarray(images.labels)[targets.classes[near.alike].any(axis=0)].tolist()
        ),
        clips=clips,
        judged=judged,
        folds=first_folds_N,
        logits=logits_NK,
        shifted_logits=shifted_NK,
        left_out=left_out_N,
        scaling=scaling,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def make_folds(targets: Targets, keys_N: list[str], at_most: int, seed: int) -> list[Indices]:
    """Assign images to folds (N,), those with equal *keys_N* to the same; with few keys, in three ways."""
    seeds = [derive_seed(seed, "folds")]
    if targets.activation == "softmax" and len(set(keys_N)) < FEW_GROUPS:
        seeds += [derive_seed(seed, "folds", attempt) for attempt in (1, 2)]
    return [targets.folds(keys_N, at_most, fold_seed) for fold_seed in seeds]


def judge_few_apart(targets: Targets, folds_N: Indices, groups_N: Indices) -> Indices:
    """Move classes of fewer than `ENOUGH` groups, beside larger ones, from *folds_N* to own folds (N,).

    If one of its two photographs is missing, a head takes more images of other classes for such a
    class than the deployed network, which learns from both. So heads that have all images of the
    small classes judge the images of the other classes. There are at most four own folds, each with
    one group of each small class.
    """
    # The groups of each class, in this order, and the rank of each in its class
    labels_P, groups_P = np.unique(np.stack([targets.strata, groups_N]), axis=1)
    _, first_P, class_P = np.unique(labels_P, return_index=True, return_inverse=True)
    rank_P = np.arange(len(labels_P)) - first_P[class_P]
    is_few_P = np.bincount(class_P)[class_P] < ENOUGH
    if is_few_P.all() or not is_few_P.any() or targets.activation == "sigmoid":
        return folds_N

    own_fold_G = np.full(int(groups_N.max()) + 1, -1)
    own_fold_G[groups_P[is_few_P]] = rank_P[is_few_P]
    own_fold_N = own_fold_G[groups_N]
    moved_N = np.where(own_fold_N < 0, folds_N, int(folds_N.max()) + 1 + own_fold_N)
    return np.unique(moved_N, return_inverse=True)[1]  # renumbered, without empty folds


def _choose_judged(
    images: LabeledImages, targets: Targets, copies_N: Indices, groups_N: Indices
) -> Indices:
    """Choose the images that the score counts: of each typical photograph, the copy with the most pixels.

    With one class per image, images of a class that is one group do not count: the classifiers
    that predict them were fitted to no image of the class.
    """
    # The largest image of each group of copies. Only groups of several are opened.
    _, largest_G = np.unique(copies_N, return_index=True)
    for group in np.flatnonzero(np.bincount(copies_N) > 1):
        members = np.flatnonzero(copies_N == group)
        num_pixels = [np.prod(images.photo(index).image.size) for index in members.tolist()]
        largest_G[group] = members[np.argmax(num_pixels)]

    # Typical photographs, except photographs of classes that are one group.
    judged = largest_G[select_typical(images)[largest_G]]
    if images.is_multi_label:
        return judged
    is_one_group_K = np.array(
        [len(groups) == 1 for groups in _groups_of_classes(targets, groups_N)]
    )
    return judged[~is_one_group_K[images.targets[judged].astype(np.int64)]]


def _groups_of_classes(targets: Targets, groups_N: Indices) -> list[set[int]]:
    """Return the groups that have images of each class."""
    return [set(groups_N[of_class > 0].tolist()) for of_class in targets.classes.T]


def select_typical(images: LabeledImages) -> NDArray[np.bool_]:
    """Select the images (N,) that are like new photographs: those that no server kept.

    Photographs that a server kept are more often unknown or classified wrongly than new ones.
    Kept photographs are selected, too:

    - in a class that has no other photographs,
    - if fewer than `MIN_COSINES` photographs are not kept, too few for a threshold,
    - if images have several classes.
    """
    names = [PurePath(images.identity(index)).name for index in range(len(images))]
    is_kept_N = np.asarray([is_kept_photograph(name) for name in names], np.bool_)
    if images.is_multi_label or not is_kept_N.any() or (~is_kept_N).sum() < MIN_COSINES:
        return np.ones(len(images), np.bool_)
    classes_with_others = np.unique(images.targets[~is_kept_N])
    return ~is_kept_N | ~np.isin(images.targets, classes_with_others)


def weights_in_means(images: LabeledImages) -> NDArray[np.float64]:
    """Return the weights (N,) in the class means; the weight of a typical image is 1."""
    return np.where(select_typical(images), 1.0, KEPT_WEIGHT)


def _evaluate(
    setup: Setup, network: Classifier, found: CrossValidation
) -> tuple[Rate | MeanPrecision | None, HeldOutMetrics]:
    """Return the score and the metrics of the held-out images, or else of the cross-validation."""
    recipe = setup.recipe
    held_out = setup.data.held_out
    images = setup.data.train
    if len(held_out):
        dataset = PreprocessedDataset(held_out, recipe.preprocess)
        logits, targets = predict_logits(
            network, dataset, recipe.preprocess, workers=recipe.workers
        )
        groups = np.arange(len(held_out)) if held_out.groups is None else held_out.groups
        expected = Targets.of(held_out)
        metrics = held_out_metrics(setup.labels, logits, targets)
        return estimate_score(
            expected.classes, expected.activation, logits, recipe.seed, groups
        ), metrics
    score = found.score()
    # Of copies of a photograph, one counts.
    counted = np.arange(len(images)) if score is None else found.judged
    metrics = held_out_metrics(
        setup.labels, found.shifted_logits[counted], images.targets[counted]
    )
    return score, metrics


def _describe(
    setup: Setup,
    found: CrossValidation,
    score: Rate | MeanPrecision | None,
    is_doubted_N: NDArray[np.bool_],
    label_logits: Array | None,
) -> FewShotResult:
    """Describe the training images, their groups and copies, the classifier and its *score*."""
    images = setup.data.train
    targets = found.problem.targets
    head = found.features.head
    classes_NK = targets.classes
    counts = dict(zip(images.labels, classes_NK.sum(axis=0).astype(int).tolist(), strict=True))
    judged_K = classes_NK[found.judged].sum(axis=0).astype(int)
    if len(setup.data.held_out):
        judged_K = setup.data.held_out.class_counts()
    groups = _groups_of_classes(targets, found.groups)
    num_groups = {
        label: len(of_class) for label, of_class in zip(images.labels, groups, strict=True)
    }

    # Copies of one photograph with different labels.
    contradictions = []
    labels_N = number_classes(images.targets)
    for photograph in np.flatnonzero(np.bincount(found.copies) > 1):
        indices = np.flatnonzero(found.copies == photograph)
        first_of_labels = np.unique(labels_N[indices], return_index=True)[1]
        if len(first_of_labels) > 1:
            # Of many copies, such as the frames of a clip, one image of each class is named.
            if len(indices) > MAX_COPIES:
                indices = indices[np.sort(first_of_labels)]
            contradictions.append(" = ".join(map(images.identity, indices.tolist())))

    # What the images that count tell about the classes.
    has_one_class = targets.activation == "softmax"
    right = found.logits[found.judged].argmax(axis=1) == targets.strata[found.judged]
    gains = estimate_gains(found.problem, found.scaling, found.judged, right, images.labels)
    diffuse = found.problem.diffuse_classes().tolist() if has_one_class else []
    taps = f" of {', '.join(head.taps)}" if head.taps else ""
    return FewShotResult(
        top1=score if isinstance(score, Rate) else None,
        map=score if isinstance(score, MeanPrecision) else None,
        estimated_on="held-out" if len(setup.data.held_out) else "cross-validation",
        class_counts=counts,
        judged_counts=dict(zip(images.labels, judged_K.tolist(), strict=True)),
        is_uneven=has_one_class
        and max(counts.values()) > UNEVEN * max(1, min(counts.values())),
        num_images=len(images),
        left_out=tuple(map(str, setup.data.left_out)),
        # Photographs that a server kept; they do not count as typical.
        num_selected=int((~select_typical(images)).sum()),
        num_doubted=int(is_doubted_N.sum()),
        without_doubted=None
        if label_logits is None or len(setup.data.held_out)
        else _score_without_doubted(found, is_doubted_N, label_logits),
        gains=gains,
        num_duplicates=len(images) - len(set(found.features.hashes)),
        num_groups=int(found.groups.max()) + 1,
        num_photographs=int(found.copies.max()) + 1,
        one_group=tuple(label for label, number in num_groups.items() if number == 1),
        two_groups=tuple(
            label for label, number in num_groups.items() if number == 2 and counts[label] > 2
        ),
        contradictions=tuple(contradictions),
        alike=found.alike,
        confused=_find_confused(found, images.labels) if has_one_class else (),
        diffuse=tuple(images.labels[label] for label in diffuse),
        clip=tuple(map(images.identity, found.clips.found or ())),
        possible_clip=tuple(map(images.identity, found.clips.doubtful or ())),
        clip_pattern=found.clips.pattern,
        head=f"{setup.recipe.model.name} {head.kind}{taps}",
        num_features=len(found.problem.space.center),
        temperature=found.scaling.temperature,
        seconds=found.seconds,
    )


def _score_without_doubted(
    found: CrossValidation, is_doubted_N: NDArray[np.bool_], label_logits: Array
) -> tuple[float, float] | None:
    """Compute two accuracies on the judged images whose labels are not doubted, the lower one first.

    One accuracy is of the classifiers that were fitted to the doubted labels, too, as the network
    is. The other one is of the classifiers of *label_logits*, which were not fitted to them. None
    if no label is doubted, or all are.
    """
    kept = found.judged[~is_doubted_N[found.judged]]
    if not is_doubted_N.any() or not len(kept):
        return None
    labels = found.problem.targets.strata[kept]
    with_them = float((found.logits[kept].argmax(axis=1) == labels).mean())
    without_them = float((label_logits[kept].argmax(axis=1) == labels).mean())
    return min(with_them, without_them), max(with_them, without_them)


def _find_confused(
    found: CrossValidation, labels: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Find the pairs of classes that the network tells apart hardly better than by chance.

    Only the images of the two classes that are predicted as one of them count. In each class, at
    least the share `CHANCE` of these images, and at least `MIN_CONFUSED`, are predicted as the
    other class.
    """
    classes = found.problem.targets.strata[found.judged]
    predicted = found.logits[found.judged].argmax(axis=1)
    counts_KK = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts_KK, (classes, predicted), 1)
    right_K = np.diagonal(counts_KK)
    is_by_chance_KK = counts_KK >= np.maximum(
        CHANCE * (counts_KK + right_K[:, None]), MIN_CONFUSED
    )
    pairs = np.argwhere(np.triu(is_by_chance_KK & is_by_chance_KK.T, 1))
    return tuple((labels[one], labels[other]) for one, other in pairs.tolist())


def with_decision(setup: Setup, fit: FewShotFit) -> FewShotFit:
    """Return *fit* with the decision for its out-of-fold logits, without images that a server kept."""
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
    is_nothing_fitted = decision == Decision()
    num_typical_groups = len(np.unique(fit.groups[typical_N]))
    why_no_threshold = missing_threshold(num_typical_groups, fit.logits.shape[1], accepts)
    result: Any = fit.result
    return replace(
        fit,
        result=result.model_copy(update={"unknown": why_no_threshold}),
        decision=None if is_nothing_fitted else decision,
    )


def _predict_other_things(setup: Setup, fit: FewShotFit) -> Array | None:
    """Return logits (M, K) with the energies of photographs of other things; None without such photographs."""
    vectors = read_other_things(setup.weights, setup.recipe.preprocess)
    if vectors is None:
        return None
    network: Any = fit.network
    means_KD = network.pooled_head.means.cpu().numpy()
    cosines_M1 = (vectors @ means_KD.T).max(axis=1, keepdims=True)
    # The log-sum-exp of K equal logits exceeds them by log K, which is subtracted.
    return np.repeat(cosines_M1.astype(np.float64), len(means_KD), axis=1) - np.log(
        len(means_KD)
    )
