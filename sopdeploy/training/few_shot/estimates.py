"""Estimates of candidates: their out-of-fold score with an interval, and the choice among them.

The score is the top-1 accuracy, or with several classes per image the mean average precision (mAP). A
candidate is chosen over the first one if its score is higher and its loss smaller. For the estimate of the
chosen candidate, the choice is repeated for each fold on the other folds (nested cross-validation), so that
the estimate includes the effect of choosing.

Letters: N images, C classes, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import Activation
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import average_precision
from sopdeploy.evaluation.statistics import LEVEL
from sopdeploy.training.few_shot.config import MeanPrecision
from sopdeploy.training.few_shot.head import Array, loss_and_gradient

RESAMPLES = 500
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of N images: `classes` (N, C) in [0, 1], `weights` (N,) in the loss, `strata` for the folds."""

    classes: Array
    weights: Array
    strata: list[int]
    activation: Activation
    balanced: bool

    def losses(self, logits_NC: Array) -> Array:
        """Compute the weighted loss (N,) of each image; with "sigmoid", the mean over its classes."""
        losses, _ = loss_and_gradient(logits_NC, self.classes, self.activation)
        return losses * self.weights / (self.classes.shape[1] if self.activation == "sigmoid" else 1)

    def score(self, logits_NC: Array, images: Indices) -> float:
        """Compute top-1 or mAP on *images*; 0 if no image shows a class."""
        if self.activation == "softmax":
            right = logits_NC[images].argmax(axis=1) == self.classes[images].argmax(axis=1)
            return float(right.mean())
        columns = zip(self.classes[images].T > 0, logits_NC[images].T, strict=True)
        found = [average_precision(true, scores) for true, scores in columns]
        precisions = [one for one in found if one is not None]
        return float(np.mean(precisions)) if precisions else 0.0

    def estimate(self, logits_NC: Array, seed: int) -> Rate | MeanPrecision:
        """Compute top-1 with Wilson's interval, or mAP with a bootstrap interval over images."""
        count = len(self.classes)
        share = self.score(logits_NC, np.arange(count))
        if self.activation == "softmax":
            return Rate.of(round(share * count), count)
        draws_BN = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
        precisions_BC = np.stack(
            [
                resampled_precision(true, scores, draws_BN)
                for true, scores in zip(self.classes.T > 0, logits_NC.T, strict=True)
                if true.any()
            ],
            axis=1,
        )
        # A resample without any class has no precision: all NaN.
        means_B = np.nanmean(precisions_BC[~np.isnan(precisions_BC).all(axis=1)], axis=1)
        low, high = np.quantile(means_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return MeanPrecision(share=share, count=count, low=min(low, share), high=max(high, share))


def resampled_precision(true: NDArray[np.bool_], scores: Array, draws_BN: NDArray[np.int64]) -> Array:
    """Compute the average precision (B,) of a class in each resample; NaN if no image shows the class.

    *true* (N,) marks the images that show the class, *scores* (N,) are its logits, and *draws_BN* counts how
    often each resample contains each image.
    """
    order = np.argsort(-scores, kind="stable")
    weights_BN, shown = draws_BN[:, order].astype(np.float64), true[order]
    hits_BN = np.cumsum(weights_BN * shown, axis=1)
    ranks_BN = np.maximum(np.cumsum(weights_BN, axis=1), 1)
    with np.errstate(invalid="ignore"):
        precision_B: Array = (weights_BN * shown * hits_BN / ranks_BN).sum(axis=1) / hits_BN[:, -1]
    return precision_B


def shortcoming(targets: Targets, candidate_NC: Array, first_NC: Array, images: Indices) -> str:
    """Describe why *candidate_NC* (logits) is not better than *first_NC* on *images*; empty if it is."""
    if targets.score(candidate_NC, images) <= targets.score(first_NC, images):
        return (
            "it does not classify more images correctly"
            if targets.activation == "softmax"
            else "the mAP is not higher"
        )
    losses = [float(targets.losses(logits)[images].sum()) for logits in (candidate_NC, first_NC)]
    return "" if losses[0] < losses[1] else "the loss is not smaller"


def choose(targets: Targets, candidates: Sequence[Array], images: Indices) -> int:
    """Choose a candidate by its logits (N, C) on *images*; return its position in *candidates*.

    Returns the candidate with the smallest loss among those that beat the first one, otherwise the first.
    """
    better = [
        index
        for index in range(1, len(candidates))
        if not shortcoming(targets, candidates[index], candidates[0], images)
    ]
    return min(better, key=lambda index: float(targets.losses(candidates[index])[images].sum()), default=0)


def choose_by_fold(targets: Targets, candidates: Sequence[Array], folds_N: Indices) -> Array:
    """Choose a candidate for each fold on the other folds; return the logits (N, C) of these candidates."""
    images, composed = np.arange(len(folds_N)), np.zeros_like(candidates[0])
    for fold in range(int(folds_N.max()) + 1):
        tested = folds_N == fold
        composed[tested] = candidates[choose(targets, candidates, images[~tested])][tested]
    return composed
