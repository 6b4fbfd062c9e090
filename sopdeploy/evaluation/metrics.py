"""From scores to figures: shares with intervals, the loss, calibration, every class, who is taken for whom.

Calibration error: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), Eq. (3): pictures go
into 15 bins of equal width by the confidence of their first answer; the error is the mean distance of
confidence and accuracy, each bin weighed by its pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pydantic

from sopdeploy.config import Share, StrictModel
from sopdeploy.errors import DataError
from sopdeploy.evaluation.statistics import wilson

FIRST = 5  # answers that are kept of each picture


@dataclass(frozen=True, slots=True)
class Score:
    """Classes by their place among the sorted names.

    `answers` are the first five, best first; `confidence` is the probability of the first, `likelihood` that
    of the picture's own class, `target`.
    """

    target: int
    answers: tuple[int, ...]
    confidence: float
    likelihood: float

    @property
    def right(self) -> bool:
        """Say whether the first answer is the picture's class."""
        return self.answers[0] == self.target


def score(target: int, ranked: Sequence[tuple[int, float]]) -> Score:
    """Return the score of a picture of class *target*, of all classes *ranked* with their probabilities."""
    return Score(
        target=target,
        answers=tuple(place for place, _ in ranked[:FIRST]),
        confidence=ranked[0][1],
        likelihood=next(probability for place, probability in ranked if place == target),
    )


BINS = 15
SMALLEST = 2.2250738585072014e-308  # a probability that has become 0 counts as this one, a loss of 708


class Rate(StrictModel):
    """`right` of `count` pictures: the share, and Wilson's 95 % interval of the true one."""

    share: Share
    right: int
    count: int
    low: Share
    high: Share

    @classmethod
    def of(cls, right: int, count: int) -> "Rate":
        """Return the rate of *right* of *count*, 0 where there is nothing to count."""
        interval = wilson(right, count)
        return cls(
            share=right / count if count else 0.0,
            right=right,
            count=count,
            low=interval.low,
            high=interval.high,
        )


class ClassFigures(StrictModel):
    """One class: how often it is right when it is answered, and how often it is found.

    `precision` is None where the class was never answered.
    """

    label: str
    count: int
    answered: int
    precision: Share | None
    recall: Rate


class Bin(StrictModel):
    """Pictures whose confidence is above `low` and at most `high`; the means are None without any."""

    low: float
    high: float
    count: int
    confidence: Share | None
    accuracy: Share | None


class Calibration(StrictModel):
    """The expected calibration error over `bins` bins, and the curve it is taken from."""

    error: Share
    bins: int
    curve: tuple[Bin, ...]


class Measurement(StrictModel):
    """How good the answers to `count` pictures are.

    `nll` is the mean negative log-likelihood. `classes` are sorted by name and `confusion` has their order:
    rows are what the pictures show, columns what was answered. With fewer than five classes `top5` counts
    the pictures whose class is among all answers.
    """

    count: int
    top1: Rate
    top5: Rate
    nll: Annotated[float, pydantic.Field(ge=0)]
    calibration: Calibration
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]


def measure(labels: Sequence[str], scores: Sequence[Score]) -> Measurement:
    """Return the figures of *scores* over the classes *labels*; raises `DataError` without any score."""
    count = len(scores)
    if not count:
        raise DataError("there are no pictures to measure on; give a folder with images")
    confusion = [[0] * len(labels) for _ in labels]
    for one in scores:
        confusion[one.target][one.answers[0]] += 1
    return Measurement(
        count=count,
        top1=Rate.of(sum(one.right for one in scores), count),
        top5=Rate.of(sum(one.target in one.answers for one in scores), count),
        nll=math.fsum(-math.log(max(one.likelihood, SMALLEST)) for one in scores) / count,
        calibration=calibration(scores),
        classes=tuple(class_figures(labels, confusion)),
        confusion=tuple(map(tuple, confusion)),
    )


def class_figures(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[ClassFigures]:
    """Return the figures of each class from who was taken for whom."""
    answered = [sum(column) for column in zip(*confusion, strict=True)]
    return [
        ClassFigures(
            label=label,
            count=sum(row),
            answered=answered[place],
            precision=row[place] / answered[place] if answered[place] else None,
            recall=Rate.of(row[place], sum(row)),
        )
        for place, (label, row) in enumerate(zip(labels, confusion, strict=True))
    ]


def calibration(scores: Sequence[Score]) -> Calibration:
    """Return how far confidence is from accuracy."""
    members: list[list[Score]] = [[] for _ in range(BINS)]
    for one in scores:
        members[min(BINS - 1, max(0, math.ceil(one.confidence * BINS) - 1))].append(one)
    curve = tuple(one_bin(place, found) for place, found in enumerate(members))
    gaps = (
        one.count * abs(one.confidence - one.accuracy)
        for one in curve
        if one.confidence is not None and one.accuracy is not None
    )
    return Calibration(error=min(1.0, math.fsum(gaps) / len(scores)), bins=BINS, curve=curve)


def one_bin(place: int, found: Sequence[Score]) -> Bin:
    """Return the bin at *place* with the pictures *found* in it."""
    count = len(found)
    return Bin(
        low=place / BINS,
        high=(place + 1) / BINS,
        count=count,
        confidence=min(1.0, math.fsum(one.confidence for one in found) / count) if count else None,
        accuracy=sum(one.right for one in found) / count if count else None,
    )
