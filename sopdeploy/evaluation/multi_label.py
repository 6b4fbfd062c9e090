"""Metrics for images with any number of classes: average precision, F1, and thresholds per class.

Does not import torch. Average precision is the mean precision at the rank of every image that
shows the class, with equal probabilities at one rank; mAP is its mean over the classes. F1 is 2
TP / (2 TP + FP + FN).

Letters: N images, C classes, B resamples, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import NO_IMAGES, effective_count, wilson
from sopdeploy.evaluation.statistics import LEVEL

DEFAULT_THRESHOLD = 0.5
NO_CLASS = "no image shows a class of the network; add images that do"
_NUM_RESAMPLES = 500  # for the interval of an mAP


class MeanPrecision(StrictModel):
    """Mean average precision `value` over `count` images with a 95 % interval [`low`, `high`]."""

    value: Fraction
    count: int
    low: Fraction
    high: Fraction

    @classmethod
    def of(
        cls,
        true: NDArray[np.bool_],
        scores: NDArray[np.float64],
        seed: int,
        groups: NDArray[np.integer] | None = None,
    ) -> "MeanPrecision":
        """Compute the mAP of *scores* (N, C), where *true* (N, C) marks the classes of each image.

        The interval comes from `_NUM_RESAMPLES` resamples (bootstrap) of the *groups* (N,), by
        default images; *seed* determines them. Resamples of a perfect ranking are all perfect, so
        the interval is widened to Wilson's interval of an equal share of the independent
        images, whose number is `effective_count`. Raises `DataError` if no image shows any
        class.
        """
        # Only classes that have an image count.
        shown = np.flatnonzero(true.any(axis=0)).tolist()
        if not shown:
            raise DataError(NO_CLASS)

        value = float(
            np.mean([average_precision(true[:, column], scores[:, column]) for column in shown])
        )

        # The interval: groups are drawn with replacement, and each resample has an mAP.
        given_N = np.arange(len(true)) if groups is None else groups
        unique, group_N = np.unique(given_N, return_inverse=True)  # numbered from 0
        equal_shares_G = [1 / len(unique)] * len(unique)
        draws_BG = np.random.default_rng(seed).multinomial(
            len(unique), equal_shares_G, _NUM_RESAMPLES
        )

        draws_BN = draws_BG[:, group_N]  # how often each resample contains each image
        resampled_BC = np.stack(
            [
                resampled_precision(true[:, column], scores[:, column], draws_BN)
                for column in shown
            ],
            axis=1,
        )

        shows_a_class_B = ~np.isnan(resampled_BC).all(axis=1)
        means = np.nanmean(resampled_BC[shows_a_class_B], axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        units = effective_count(group_N)
        least = wilson(value * units, units)
        return cls(
            value=value, count=len(true), low=min(low, least.low), high=max(high, least.high)
        )


class MultiLabelMetrics(StrictModel):
    """Mean average precision, F1 at a threshold of 0.5, and mean loss over `count` images.

    `thresholds` are those that maximize F1 on these images, one per class
    (`decision_fit.fit_thresholds`).
    """

    score_name: ClassVar[str] = "mAP"
    map: Fraction
    macro_f1: Fraction
    micro_f1: Fraction
    count: int
    loss: float
    thresholds: tuple[Fraction, ...]

    @property
    def score(self) -> float:
        """The mean average precision, which selects the best epoch."""
        return self.map


class MultiLabelClass(StrictModel):
    """Metrics of one class at its threshold.

    `count` images show the class; for `answered` images it is predicted. A metric with
    denominator 0 is None.
    """

    label: str
    count: int
    answered: int
    threshold: Fraction
    average_precision: Fraction | None
    precision: Fraction | None
    recall: Fraction | None
    f1: Fraction | None


class MultiLabelReport(StrictModel):
    """Metrics over `count` images, with the classes sorted by name.

    `macro_f1` is the mean F1 over the classes that have one, `micro_f1` the F1 of the counts of
    all classes.
    """

    count: Annotated[int, pydantic.Field(ge=1)]
    map: Fraction
    macro_f1: Fraction
    micro_f1: Fraction
    classes: tuple[MultiLabelClass, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelPredictions:
    """Predictions of a network with several classes per image.

    Attributes:
        labels: C class names.
        targets: (N, C), above 0 for every class of an image.
        probabilities: (N, C) float64.
        thresholds: smallest probability at which a class counts as present, per class.
    """

    labels: tuple[str, ...]
    targets: NDArray[np.floating]
    probabilities: NDArray[np.float64]
    thresholds: Sequence[float]

    def report(self) -> MultiLabelReport:
        """Compute all metrics, with classes sorted by name.

        Raises `DataError` without images, and if none shows a class.
        """
        if not len(self.targets):
            raise DataError(NO_IMAGES)

        # Images by classes: what is there, what is answered, what is both.
        true = self.targets > 0
        predicted = self.probabilities >= np.asarray(self.thresholds)
        hits = (true & predicted).sum(axis=0)  # (C,), as the next two
        counts = true.sum(axis=0)
        answers = predicted.sum(axis=0)

        # The metrics of each class; those without images have no average precision.
        by_label = sorted(range(len(self.labels)), key=lambda index: self.labels[index])
        classes = [
            MultiLabelClass(
                label=self.labels[index],
                count=int(counts[index]),
                answered=int(answers[index]),
                threshold=self.thresholds[index],
                average_precision=average_precision(
                    true[:, index], self.probabilities[:, index]
                ),
                precision=_ratio(hits[index], answers[index]),
                recall=_ratio(hits[index], counts[index]),
                f1=_ratio(2 * hits[index], counts[index] + answers[index]),
            )
            for index in by_label
        ]

        precisions = [
            row.average_precision for row in classes if row.average_precision is not None
        ]
        if not precisions:
            raise DataError(NO_CLASS)

        return MultiLabelReport(
            count=len(true),
            map=float(np.mean(precisions)),
            macro_f1=float(np.mean([row.f1 for row in classes if row.f1 is not None])),
            micro_f1=float(2 * hits.sum() / (counts.sum() + answers.sum())),
            classes=tuple(classes),
        )


def resampled_precision(
    true: NDArray[np.bool_], scores: NDArray[np.float64], draws: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Compute the average precision (B,) of a class in each of B resamples; NaN if no image shows the class.

    *true* (N,) marks the images that show the class, *scores* (N,) rank them, the highest first,
    and *draws* (B, N) counts how often each resample contains each image. Images with equal
    scores have the same rank.
    """
    best_first = np.argsort(-scores, kind="stable")
    # An image is the last one of its rank if the next one has another score.
    is_last_of_rank = np.append(np.diff(scores[best_first]) != 0, True)

    counts = draws[:, best_first].astype(np.float64)

    # (B, R): for each of R ranks, how many images have this rank or a better one (at least 1, for
    # the division), and how many of them show the class. hits / images is the precision of a
    # rank; its weight is the number of hits it adds.
    images = np.maximum(np.cumsum(counts, axis=1)[:, is_last_of_rank], 1)
    hits = np.cumsum(counts * true[best_first], axis=1)[:, is_last_of_rank]

    added_hits = np.diff(hits, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):  # without an image of the class, 0 / 0 is NaN
        precisions: NDArray[np.float64] = (added_hits * hits / images).sum(axis=1) / hits[:, -1]
    return precisions


def average_precision(true: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Compute the average precision of *scores* (N,) for a class that *true* (N,) images show, else None."""
    if not true.any():
        return None
    each_image_once = np.ones((1, len(true)), np.int64)  # as the only resample
    (precision,) = resampled_precision(true, scores, each_image_once)
    return float(min(1.0, precision))  # the rounding of its sums can exceed 1


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
