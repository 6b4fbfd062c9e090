"""Cross-validation of linear classifiers: groups of images, folds, and what each image is predicted as.

Near-duplicates, clips and what the user groups stay in one fold. Letters: N images, K classes, G
groups, P pairs of a class and a group with images of it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.photos.clips import Clips, clips_of_images
from sopdeploy.data.photos.copies import NO_PAIRS, NearDuplicates, connect, find_near_duplicates
from sopdeploy.data.photos.kept import is_kept_as_unsure
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.evaluation.decision_fit import MIN_COSINES
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.models.base import Classifier
from sopdeploy.training.few_shot.classifier import LinearProblem
from sopdeploy.training.few_shot.features import (
    CachedNetwork,
    Features,
    compute_features,
    full_head,
)
from sopdeploy.training.few_shot.scaling import ENOUGH, Scaling
from sopdeploy.training.few_shot.score import estimate_score
from sopdeploy.training.few_shot.targets import (
    Array,
    Indices,
    Targets,
    count_groups,
    divide_groups,
)
from sopdeploy.training.settings.head import FeatureSettings, HeadOptions

# Below this number of groups, temperature and cosines come from three cross-validations: the
# threshold is one of the lowest cosines, which other folds change.
FEW_GROUPS = 200
# Weight in the class means of photographs that a server kept outside of its sample. With 1, these atypical ones and
# their wrong labels move the means: of one set, 83 instead of 93 % of the foreign photographs
# were rejected, with 1/8 93 %.
KEPT_WEIGHT = 0.125


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """The features of N images of K classes, and the out-of-fold predictions of linear classifiers on them.

    Attributes:
        outputs: The frozen network that computed the features, with a head on all statistics.
        problem: The linear problem of the features that the head reads, with the targets.
        groups: The group (N,) of each image: copies, clips, and images that the user groups.
        alike: Classes whose images look so much alike that no copies are found.
        clips: What was found about clips.
        copies: The photograph (N,) that each image shows; copies have the same.
        judged: The indices of the images that the score counts.
        folds, logits: The folds (N,) of the first cross-validation, and the logits (N, K) of images
            without their fold, or that of `judge_few_apart`.
        all_folds: The folds (N,) of all cross-validations.
        shifted_logits: `logits`, shifted as the exported network does: the energy of an image is its cosine
            to the nearest class mean, on average over all cross-validations. With several classes per image,
            they are not shifted.
        left_out: The cosine (N,) of each image and the nearest mean of the other classes; None with several
            classes per image.
        scaling: What turns the scores of all heads, also of one that is fitted to all images, into logits.
        seconds: The time of the features, and of the rest.
    """

    seed: int
    outputs: CachedNetwork
    features: Features
    problem: LinearProblem
    groups: Indices
    alike: tuple[str, ...]
    clips: Clips
    copies: Indices
    judged: Indices
    folds: Indices
    all_folds: Sequence[Indices]
    logits: Array
    shifted_logits: Array
    left_out: Array | None
    scaling: Scaling
    seconds: dict[str, float]

    def score(self) -> Rate | MeanPrecision | None:
        """Estimate the score of the classifier by the images that count.

        None if each image has one class and they show fewer than two.
        """
        targets = self.problem.targets
        if len(np.unique(targets.strata[self.judged])) < 2 and targets.activation == "softmax":
            return None
        classes = targets.classes[self.judged]
        num_folds = int(self.folds.max()) + 1
        logits = self.logits[self.judged]
        groups = self.groups[self.judged]
        return estimate_score(classes, targets.activation, logits, self.seed, groups, num_folds)


def cross_validate(
    settings: FeatureSettings,
    options: HeadOptions,
    model: Classifier,
    images: LabeledImages,
    on_progress: Callable[[str, int, int], None],
    *,
    groups_by_name: bool = False,
) -> CrossValidation:
    """Cross-validate classifiers on the features of *images* by *model*, the network of *settings*.

    *on_progress* receives (step, done, total). With *groups_by_name*, the user groups images by
    their names, so that the names need no interpretation. Raises `DataError` if all images are one group, such
    as a clip or copies of one photograph.
    """
    name = settings.model.name
    count = len(images)
    targets = Targets.of(images)
    started = time.monotonic()

    # The features: half of the work, as the progress counts it.
    outputs = CachedNetwork(full_head(settings, model), settings)
    features = compute_features(
        outputs,
        options.head,
        images,
        lambda done, _total: on_progress(f"features of {name}", done, 2 * count),
    )

    # Images that are not independent, and the images that the score counts.
    grouping = _group_images(options, images, features, groups_by_name=groups_by_name)
    copies_N = grouping.copies
    groups_N = grouping.groups
    judged = _choose_judged(images, targets, copies_N, groups_N)

    features_done = time.monotonic()
    on_progress("cross-validation", count, 2 * count)

    # The folds; the key of a group is the hash of its first image.
    _, first_image_G = np.unique(groups_N, return_index=True)
    keys_N = [features.hashes[image] for image in first_image_G[groups_N].tolist()]
    folds_of_validations = make_folds(targets, keys_N, options.folds, settings.seed)
    # The folds of further validations count only in means.
    first_folds_N = folds_of_validations[0]

    # Predict each image by classifiers without its fold; if there are few groups, for several
    # divisions into folds.
    weights_N = weights_in_means(images)
    problem = LinearProblem(
        features.space, features.reduced, features.own, targets, weights_N, groups_N
    )
    validations = [problem.cross_validate(folds_N) for folds_N in folds_of_validations]
    scaling = Scaling.fit(validations, targets, has_margins=options.margins)

    # The predictions that the score judges: images of larger classes are predicted by classifiers
    # that have all photographs of the small classes (`judge_few_apart`).
    judging_folds_N = judge_few_apart(targets, first_folds_N, groups_N)
    judged_once = validations[0]
    if not np.array_equal(judging_folds_N, first_folds_N):
        judged_once = problem.cross_validate(judging_folds_N)
    logits_NK = problem.logits(judged_once, scaling)

    # The exported network shifts the logits of an image so that their energy, the log-sum-exp, is
    # its cosine to the nearest class mean. After `log_softmax`, the energy is 0.
    shifted_NK = logits_NK
    left_out_N = None
    if targets.activation == "softmax":
        cosines_VN = [problem.cosines(folds_N) for folds_N in folds_of_validations]
        shifted_NK = log_softmax(logits_NK, axis=1) + np.mean(cosines_VN, axis=0)[:, None]
        left_out_N = problem.cosines_without_class()

    seconds = {"features": features_done - started, "choice": time.monotonic() - features_done}

    return CrossValidation(
        seed=settings.seed,
        outputs=outputs,
        features=features,
        problem=problem,
        copies=copies_N,
        groups=groups_N,
        alike=tuple(
            np.asarray(images.labels)[targets.classes[grouping.alike].any(axis=0)].tolist()
        ),
        clips=grouping.clips,
        judged=judged,
        folds=first_folds_N,
        all_folds=folds_of_validations,
        logits=logits_NK,
        shifted_logits=shifted_NK,
        left_out=left_out_N,
        scaling=scaling,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


class _Grouping(NamedTuple):
    """Groups of N images that are not independent.

    Attributes:
        copies: The photograph (N,) that each image shows.
        groups: The groups (N,) by copies, clips and what the user groups.
        alike: Whether the images (N,) of the class look alike (`NearDuplicates`).
        clips: What is known of clips.
    """

    copies: Indices
    groups: Indices
    alike: NDArray[np.bool_]
    clips: Clips


def _group_images(
    options: HeadOptions, images: LabeledImages, features: Features, *, groups_by_name: bool
) -> _Grouping:
    """Group *images*, with these *features*, by near-duplicates, clips and what the user groups."""
    count = len(images)
    near = NearDuplicates(NO_PAIRS, np.zeros(count, np.bool_))
    if options.group_copies:
        near = find_near_duplicates(
            features.views, features.small, images.targets, features.hashes
        )

    # Clips; names by which the user groups need no other interpretation.
    clips = Clips(connect(count, NO_PAIRS, features.hashes, images.groups))
    if not groups_by_name:
        clips = clips_of_images(images, features.times, near.vectors, clips.groups)

    # Copies, without pairs that would join two clips, and all groups together.
    copies_N = connect(count, clips.select_pairs(near.pairs), features.hashes)
    groups_N = connect(count, NO_PAIRS, copies_N, clips.groups)
    return _Grouping(copies_N, groups_N, near.alike, clips)


def make_folds(targets: Targets, keys_N: list[str], at_most: int, seed: int) -> list[Indices]:
    """Assign images to folds (N,), those with equal *keys_N* to the same.

    With few keys and one class per image, they are assigned in three ways, otherwise in one.
    """
    seeds = [derive_seed(seed, "folds")]
    if targets.activation == "softmax" and len(set(keys_N)) < FEW_GROUPS:
        seeds += [derive_seed(seed, "folds", attempt) for attempt in (1, 2)]
    return [targets.folds(keys_N, at_most, fold_seed) for fold_seed in seeds]


def judge_few_apart(targets: Targets, folds_N: Indices, groups_N: Indices) -> Indices:
    """Move classes of fewer than `ENOUGH` groups, beside larger ones, from *folds_N* to own folds (N,).

    A head that lacks one of the two photographs of such a class takes more images of other
    classes for it than the exported network, which learns from both. So heads that have all
    images of the small classes judge the images of the other classes. There are at most four
    own folds, each with at most one group of each small class. With several classes per image,
    or without both kinds of classes, nothing is moved.
    """
    # The pairs of a class and a group with its images, sorted, and the rank of the group in the
    # class.
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
    """Choose the images that the score counts: of each photograph the copy with the most pixels, if typical.

    *copies_N* is the photograph that each image shows. Copies with different classes count once
    for each, because all of them train. With one class per image, images of a class
    that is one group of *groups_N* do not count: the classifiers that predict them were fitted to
    no image of the class.
    """
    # The largest of the copies with equal classes. Only groups of several are opened.
    alike_N = divide_groups(targets.classes, copies_N)
    _, largest_G = np.unique(alike_N, return_index=True)
    for group in np.flatnonzero(np.bincount(alike_N) > 1):
        members = np.flatnonzero(alike_N == group)
        num_pixels = [np.prod(images.photo(index).image.size) for index in members.tolist()]
        largest_G[group] = members[np.argmax(num_pixels)]

    # Typical photographs, except photographs of classes that are one group.
    judged = largest_G[select_typical(images)[largest_G]]
    if images.is_multi_label:
        return judged
    is_one_group_K = count_groups(targets.classes, groups_N) == 1
    return judged[~is_one_group_K[images.targets[judged].astype(np.int64)]]


def select_typical(images: LabeledImages) -> NDArray[np.bool_]:
    """Select the images (N,) that are like new photographs, those that no network was unsure of.

    Photographs that a server kept outside of its uniform sample are more often unknown or
    classified wrongly than new ones. They are selected, too:

    - in a class that has no other photographs,
    - if there are fewer than `MIN_COSINES` others, too few for a threshold,
    - if images have several classes.
    """
    names = [PurePath(images.identity(index)).name for index in range(len(images))]
    is_unsure_N = np.asarray([is_kept_as_unsure(name) for name in names], np.bool_)
    if images.is_multi_label or not is_unsure_N.any() or (~is_unsure_N).sum() < MIN_COSINES:
        return np.ones(len(images), np.bool_)
    classes_with_others = np.unique(images.targets[~is_unsure_N])
    return ~is_unsure_N | ~np.isin(images.targets, classes_with_others)


def weights_in_means(images: LabeledImages) -> NDArray[np.float64]:
    """Return the weights (N,) in the class means; the weight of a typical image is 1."""
    return np.where(select_typical(images), 1.0, KEPT_WEIGHT)
