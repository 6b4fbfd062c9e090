"""Classification metrics: accuracy with intervals, log loss, metrics per class, confusion matrix.

This module does not import torch. No expected calibration error is reported (Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017): on 100 images, most of it is noise of its
bins. The log loss measures the same probabilities without bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.bundle.decision import log_sum_exp
from sopdeploy.errors import DataError

TOP_K = 5
# Thresholds of the confidence that a report compares
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# Lower bound of probabilities, which limits the loss to 708
MIN_PROBABILITY = 2.2250738585072014e-308
NO_IMAGES = "there are no images to evaluate on; give a folder with images"
Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(successes: float, trials: float) -> Interval:
    """Compute the score interval of a proportion (Wilson, "Probable Inference", JASA 1927)."""
    if trials == 0:  # nothing is known
        return Interval(0.0, 1.0)

    fraction = successes / trials
    square = Z_95**2
    center = (fraction + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(fraction * (1 - fraction) / trials + square / (4 * trials**2))
    half = Z_95 * spread / (1 + square / trials)

    return Interval(max(0.0, center - half), min(1.0, center + half))


def effective_count(groups: NDArray[np.integer]) -> float:
    """Compute the number of independent images among N images: N^2 / sum of squared sizes of their groups.

    *groups* (N,) has the number of the group of each image. If all groups have the same size,
    the result is their number. It is the effective sample size of Kish, "Survey Sampling"
    (1965).
    """
    sizes = np.unique(groups, return_counts=True)[1]
    return float(len(groups) ** 2 / max(1, np.square(sizes).sum()))  # 0 without images


@dataclass(frozen=True, slots=True)
class ImageScore:
    """Prediction for one image; classes are indices into the sorted class names.

    `top5` are the five most probable classes, best first. `confidence` is the probability of
    the first one, `likelihood` the probability of the true class `target`. `known` is whether
    the image is accepted as one of the classes; `None` without a threshold. Images of one
    `group` are not independent; `None` is a group of one image.
    """

    target: int
    top5: tuple[int, ...]
    confidence: float
    likelihood: float
    known: bool | None = None
    group: int | None = None

    @property
    def correct(self) -> bool:
        """Whether the most probable class is the target."""
        return self.top5[0] == self.target


class Rate(StrictModel):
    """A fraction `share` = `right` / `count` with Wilson's 95 % interval [`low`, `high`]."""

    share: Fraction
    right: int
    count: int
    low: Fraction
    high: Fraction

    @property
    def value(self) -> float:
        """The fraction, under the name that other scores with an interval have."""
        return self.share

    @classmethod
    def of(cls, right: int, count: int, units: float | None = None) -> "Rate":
        """Compute the rate of *right* in *count*; the fraction is 0 if *count* is 0.

        The interval is that of *units* independent images, by default all.
        """
        scale = 1.0 if units is None else units / max(1, count)
        low, high = wilson(scale * right, scale * count)
        return cls(
            share=right / count if count else 0.0, right=right, count=count, low=low, high=high
        )


class ClassMetrics(StrictModel):
    """Precision and recall of one class.

    `answered` counts the predictions of this class; `precision` is None if there are none,
    `recall` if there are no images of this class.
    """

    label: str
    count: int
    answered: int
    precision: Fraction | None
    recall: Rate | None


class ThresholdMetrics(StrictModel):
    """What a threshold on the confidence does: a person decides on the images below it.

    `right` of the other `kept` images are classified correctly.
    """

    confidence: Fraction
    kept: int
    right: int
    left_to_person: int


class ClassificationReport(StrictModel):
    """Metrics over `count` images.

    `log_loss` is the mean negative log-likelihood. `classes` are those with an image or a
    prediction, sorted by name; the rows of `confusion` are true classes and its columns
    predicted classes, in the same order. With fewer than five classes `top5` covers all of
    them. `accepted` is the fraction of images that are accepted as known; `None` if no
    threshold was fitted. `thresholds` has a row for each of `CONFIDENCES`.
    """

    count: int
    top1: Rate
    top5: Rate
    log_loss: Annotated[float, pydantic.Field(ge=0)]
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    accepted: Rate | None = None
    thresholds: tuple[ThresholdMetrics, ...] = ()

    def mistakes(self) -> list[tuple[str, str, int]]:
        """List (true class, predicted class, number of images), the most frequent mistake first."""
        confusions = []
        for row, counts in zip(self.classes, self.confusion, strict=True):
            for column, count in zip(self.classes, counts, strict=True):
                if count and row is not column:
                    confusions.append((row.label, column.label, count))
        return sorted(confusions, key=lambda confusion: -confusion[2])


def classification_report(
    labels: Sequence[str], scores: Sequence[ImageScore]
) -> ClassificationReport:
    """Compute all metrics of *scores* over the classes *labels*; raises `DataError` without scores.

    The intervals are those of independent groups (`effective_count`).
    """
    count = len(scores)
    if not count:
        raise DataError(NO_IMAGES)

    # Images of one group are not independent; they count as fewer. An image without a group gets
    # one of its own, with a negative number.
    targets = np.array([score.target for score in scores])
    predicted = np.array([score.top5[0] for score in scores])
    groups = np.array(
        [
            -1 - index if score.group is None else score.group
            for index, score in enumerate(scores)
        ]
    )
    units = effective_count(groups)

    # The confusion matrix of the classes that occur: a row per target, a column per prediction.
    occurring = np.union1d(targets, predicted)  # sorted
    rows = np.searchsorted(occurring, targets)
    columns = np.searchsorted(occurring, predicted)
    confusion = count_confusion(rows, columns, len(occurring))

    # Precision, the share of right answers, and recall, that of recognized images, by class.
    classes = []
    for row, class_index in enumerate(occurring.tolist()):
        hits = int(confusion[row, row])
        num_images = int(confusion[row].sum())
        num_answered = int(confusion[:, row].sum())

        recall = None
        if num_images:
            units_of_class = effective_count(groups[targets == class_index])
            recall = Rate.of(hits, num_images, units_of_class)
        row_of_class = ClassMetrics(
            label=labels[class_index],
            count=num_images,
            answered=num_answered,
            precision=hits / num_answered if num_answered else None,
            recall=recall,
        )
        classes.append(row_of_class)

    # Without a threshold, no image is known or unknown.
    known = [score.known for score in scores if score.known is not None]
    losses = (-math.log(max(score.likelihood, MIN_PROBABILITY)) for score in scores)

    return ClassificationReport(
        count=count,
        top1=Rate.of(sum(score.correct for score in scores), count, units),
        top5=Rate.of(sum(score.target in score.top5 for score in scores), count, units),
        log_loss=math.fsum(losses) / count,
        classes=tuple(classes),
        confusion=tuple(map(tuple, confusion.tolist())),
        accepted=Rate.of(sum(known), count, units) if len(known) == count else None,
        thresholds=tuple(measure_threshold(scores, confidence) for confidence in CONFIDENCES),
    )


def count_confusion(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    """Count the images (C, C) by their class, *truth* (P,), and by the class *predicted* (P,)."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def measure_threshold(scores: Sequence[ImageScore], confidence: float) -> ThresholdMetrics:
    """Count the images whose confidence is at least *confidence*, and the right predictions of these."""
    kept = [score for score in scores if score.confidence >= confidence]
    return ThresholdMetrics(
        confidence=confidence,
        kept=len(kept),
        right=sum(score.correct for score in kept),
        left_to_person=len(scores) - len(kept),
    )


def log_loss(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """Compute the mean negative log-likelihood of the classes *targets* (N,) under *logits* (N, C)."""
    return float((log_sum_exp(logits) - logits[np.arange(len(targets)), targets]).mean())
