"""Drift: do new predictions come from the same distribution as those of the held-out images?

Compares how often each class is the most probable one, and how the largest probabilities are distributed,
with Pearson's chi-square test of homogeneity of two samples. The reference is a sample too, often a small
one, so its own noise counts. Categories that are rare in both samples are merged, because the test needs an
expected count of about 5 (Cochran, "Some methods for strengthening the common chi-square tests", Biometrics
1954).

With several classes per image, compares the share of images in which each class is present, class by class
with a Bonferroni correction because the classes of an image depend on each other, and how many classes the
images have.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import (
    CONFIDENCE_BOUNDS,
    MAX_PER_IMAGE,
    Decision,
    PresenceReference,
    Reference,
    sigmoid,
)

FALSE_ALARMS = 0.01  # of a comparison by both tests, if there is no drift
LEVEL = FALSE_ALARMS / 2  # of each of the two tests (Bonferroni)
MIN_EXPECTED = 5.0

Counts = NDArray[np.int64]


class Comparison(NamedTuple):
    """One test: the total variation *distance* of the shares in [0, 1], and the *p_value* of equal shares."""

    distance: float
    p_value: float

    @property
    def alarm(self) -> bool:
        """Whether the test rejects equal shares at `LEVEL`."""
        return self.p_value < LEVEL


class Drift(NamedTuple):
    """The comparison of *images* predictions with a reference: two *tests* by what they compare."""

    images: int
    tests: dict[str, Comparison]

    @property
    def alarm(self) -> bool:
        """Whether one of both tests raises an alarm; without drift with a probability of `FALSE_ALARMS`."""
        return any(test.alarm for test in self.tests.values())


class PredictionCounts:
    """Counts predictions by class and by confidence."""

    tests = ("classes", "confidences")

    def __init__(self, classes: int) -> None:
        self.classes: Counts = np.zeros(classes, np.int64)
        self.confidences: Counts = np.zeros(len(CONFIDENCE_BOUNDS) + 1, np.int64)

    @property
    def images(self) -> int:
        """Number of predictions."""
        return int(self.classes.sum())

    def add_logits(self, logits: NDArray[Any]) -> None:
        """Count predictions with finite *logits* (n, C)."""
        top = logits.argmax(axis=1)
        shifted = logits - logits[np.arange(len(logits)), top][:, None]
        self.add(top, 1.0 / np.exp(shifted).sum(axis=1))

    def add(self, classes: NDArray[np.integer], confidences: NDArray[np.floating]) -> None:
        """Count predictions of *classes* (n,) with the largest probabilities *confidences* (n,)."""
        self.classes += np.bincount(classes, minlength=len(self.classes))
        interval = np.searchsorted(CONFIDENCE_BOUNDS, confidences, side="right")
        self.confidences += np.bincount(interval, minlength=len(self.confidences))

    def reference(self) -> Reference:
        """Return the counts as the reference of later predictions."""
        return Reference(classes=tuple(self.classes.tolist()), confidences=tuple(self.confidences.tolist()))

    def compare(self, reference: Reference) -> Drift:
        """Compare the counts with *reference*, which has as many classes."""
        return Drift(
            self.images,
            {
                "classes": compare(np.array(reference.classes), self.classes),
                "confidences": compare(np.array(reference.confidences), self.confidences),
            },
        )


class PresenceCounts:
    """Counts predictions of a network with several classes per image, which are present at *thresholds*."""

    tests = ("classes", "per_image")

    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = np.asarray(thresholds)
        self.classes: Counts = np.zeros(len(thresholds), np.int64)
        self.per_image: Counts = np.zeros(MAX_PER_IMAGE + 1, np.int64)

    @property
    def images(self) -> int:
        """Number of predictions."""
        return int(self.per_image.sum())

    def add_logits(self, logits: NDArray[Any]) -> None:
        """Count predictions with finite *logits* (n, C)."""
        self.add_probabilities(sigmoid(logits))

    def add_probabilities(self, probabilities: NDArray[np.float64]) -> None:
        """Count predictions with *probabilities* (n, C)."""
        present = probabilities >= self._thresholds
        self.add(present.nonzero()[1], present.sum(axis=1))

    def add(self, classes: NDArray[np.integer], numbers: NDArray[np.integer]) -> None:
        """Count *numbers* (n,) of present classes of n images, and these *classes* (sum of *numbers*,)."""
        self.classes += np.bincount(classes, minlength=len(self.classes))
        self.per_image += np.bincount(np.minimum(numbers, MAX_PER_IMAGE), minlength=MAX_PER_IMAGE + 1)

    def reference(self) -> PresenceReference:
        """Return the counts as the reference of later predictions."""
        return PresenceReference(
            images=self.images,
            classes=tuple(self.classes.tolist()),
            per_image=tuple(self.per_image.tolist()),
        )

    def compare(self, reference: PresenceReference) -> Drift:
        """Compare the counts with *reference*, which has as many classes."""
        per_image = compare(np.array(reference.per_image), self.per_image)
        return Drift(self.images, {"classes": self._compare_classes(reference), "per_image": per_image})

    def _compare_classes(self, reference: PresenceReference) -> Comparison:
        """Test each class alone; return the largest distance, and the smallest p-value times the tests."""
        sizes = np.array([reference.images, self.images])
        distance, smallest, tests = 0.0, 1.0, 0
        for present_2 in zip(reference.classes, self.classes.tolist(), strict=True):
            counts_22 = np.array([sizes - present_2, present_2])
            rarest = counts_22.sum(axis=1).min() * sizes.min() / sizes.sum()
            found = compare(*counts_22.T)
            distance = max(distance, found.distance)
            if rarest >= MIN_EXPECTED:
                smallest, tests = min(smallest, found.p_value), tests + 1
        return Comparison(distance, min(1.0, smallest * tests) if tests else 1.0)


def counts_for(decision: Decision, classes: int) -> PredictionCounts | PresenceCounts:
    """Create the counts of predictions of *classes* classes that fit to the reference of *decision*."""
    return PredictionCounts(classes) if decision.thresholds is None else PresenceCounts(decision.thresholds)


def compare_counts(counts: PredictionCounts | PresenceCounts, decision: Decision) -> Drift | None:
    """Compare *counts* of `counts_for` with the reference of *decision*; None if it has none."""
    if isinstance(counts, PresenceCounts) and isinstance(decision.reference, PresenceReference):
        return counts.compare(decision.reference)
    if isinstance(counts, PredictionCounts) and isinstance(decision.reference, Reference):
        return counts.compare(decision.reference)
    return None


def compare(first: Counts, second: Counts) -> Comparison:
    """Compare two samples, given as counts *first* (K,) and *second* (K,) of the same K categories.

    Rare categories are merged for the p-value. An empty sample has the distance 0 and the p-value 1.
    """
    counts_2K = np.stack([first, second]).astype(np.float64)
    sizes_2 = counts_2K.sum(axis=1)
    if not sizes_2.all():
        return Comparison(0.0, 1.0)
    shares_2K = counts_2K / sizes_2[:, None]
    distance = float(np.abs(shares_2K[0] - shares_2K[1]).sum() / 2)
    merged_2K = _merge_rare(counts_2K)
    expected_2K = sizes_2[:, None] * merged_2K.sum(axis=0) / sizes_2.sum()
    statistic = float((np.square(merged_2K - expected_2K) / expected_2K).sum())
    return Comparison(distance, chi_square_tail(statistic, merged_2K.shape[1] - 1))


def _merge_rare(counts_2K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Merge the categories whose expected count in the smaller sample is below `MIN_EXPECTED`."""
    sizes_2, totals_K = counts_2K.sum(axis=1), counts_2K.sum(axis=0)
    rare_K = totals_K * sizes_2.min() / sizes_2.sum() < MIN_EXPECTED
    kept, rest = counts_2K[:, ~rare_K], counts_2K[:, rare_K].sum(axis=1, keepdims=True)
    return np.concatenate([kept, rest], axis=1) if rest.sum() else kept


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Approximate the probability of a larger *statistic* (Wilson and Hilferty, PNAS 1931)."""
    if degrees < 1:
        return 1.0
    variance = 2.0 / (9.0 * degrees)
    deviation = ((statistic / degrees) ** (1 / 3) - (1.0 - variance)) / math.sqrt(variance)
    return math.erfc(deviation / math.sqrt(2.0)) / 2.0
