"""Linear heads on frozen features: targets, folds, and the comparison of poolings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages
from sopdeploy.errors import DataError
from sopdeploy.models.base import Classifier
from sopdeploy.training.few_shot.config import CandidateResult, FewShotConfig
from sopdeploy.training.few_shot.estimates import Targets, choose, choose_by_fold, shortcoming
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.few_shot.head import Array, HeadEstimate, HeadProblem, assign_folds, cross_validate
from sopdeploy.training.few_shot.networks import HeadNetwork


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A network with its head problem and estimate; `index` is its position in the features."""

    name: str
    network: Classifier
    problem: HeadProblem
    estimate: HeadEstimate
    index: int


@dataclass(frozen=True, slots=True)
class Heads:
    """Results of the compared heads, the `chosen` head, and out-of-fold `logits` (N, C) of the choice."""

    chosen: FittedHead
    logits: Array
    results: tuple[CandidateResult, ...]


def class_targets(images: LabeledImages, config: FewShotConfig) -> Targets:
    """Build the `Targets` of *images* from class indices (N,) or, with several classes per image, (N, C).

    With several classes per image, the stratum of an image is its rarest class, or -1 without a class.
    Classes are then not balanced, because the loss of a class does not depend on other classes.
    """
    targets = images.targets
    if targets.ndim == 1:
        classes = np.eye(len(images.labels))[targets]
        counts = classes.sum(axis=0)
        present = np.maximum(counts, 1)
        balanced = bool(counts.max() > config.balance_above * present.min())
        weights = classes @ (counts.mean() / present) if balanced else np.ones(len(images))
        return Targets(classes, weights, targets.tolist(), "softmax", balanced)
    rarest = np.where(targets > 0, targets.sum(axis=0), np.iinfo(np.int64).max).argmin(axis=1)
    strata = np.where(targets.any(axis=1), rarest, -1).tolist()
    return Targets((targets > 0).astype(np.float64), np.ones(len(images)), strata, "sigmoid", False)


def make_folds(features: Features, targets: Targets, folds: int, seed: int) -> NDArray[np.intp]:
    """Assign each image a fold (N,); there are at most as many folds as the smallest class has images.

    Raises `DataError` if all images are the same.
    """
    counts = targets.classes.sum(axis=0)
    smallest = int(counts[counts > 0].min(initial=folds))
    folds_N = assign_folds(targets.strata, features.keys, max(2, min(folds, smallest)), seed)
    if folds_N.max() == 0:
        raise DataError("all training images have the same pixels; cross-validation needs different images")
    return folds_N


def compare_heads(
    networks: Sequence[HeadNetwork],
    features: Features,
    targets: Targets,
    folds_N: NDArray[np.intp],
    seed: int,
    on_head: Callable[[int, int], None],
) -> Heads:
    """Cross-validate the head of each of *networks* and choose one.

    The chosen head has the smallest loss of those that are better than the first one (`choose`).
    """
    heads = []
    for number, (name, network) in enumerate(networks):
        on_head(number, len(networks))
        vectors = features.vectors[number].numpy()
        problem = HeadProblem.create(vectors, targets.classes, targets.weights, targets.activation)
        heads.append(FittedHead(name, network, problem, cross_validate(problem, folds_N), number))
    on_head(len(networks), len(networks))
    logits, images = [head.estimate.logits for head in heads], np.arange(len(folds_N))
    best = choose(targets, logits, images)
    results = []
    for number, head in enumerate(heads):
        reason = shortcoming(targets, logits[number], logits[0], images) if number else ""
        if not reason:
            reason = "smallest loss" if number == best else "another head has a smaller loss"
        results.append(
            CandidateResult(
                name=f"{head.name} head",
                kept=number == best,
                reason=reason if len(heads) > 1 else "the only head",
                score=targets.estimate(logits[number], seed),
                loss=float(targets.losses(logits[number]).mean()),
                features=head.problem.basis.shape[1],
                l2=head.estimate.l2,
            )
        )
    return Heads(heads[best], choose_by_fold(targets, logits, folds_N), tuple(results))
