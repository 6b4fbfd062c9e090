"""Drift: do new predictions come from the same distribution as those of the held-out images?

Compares how often each class is the most probable one, and how the largest probabilities are distributed,
with Pearson's chi-square test of homogeneity of two samples. The reference is a sample too, often a small
one, so its own noise counts. Categories that are rare in both samples are merged, because the test needs an
expected count of about 5 (Cochran, "Some methods for strengthening the common chi-square tests", Biometrics
1954).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import CONFIDENCE_BOUNDS, Reference

FALSE_ALARMS = 0.01  # of a comparison of classes and confidences, if there is no drift
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
    """The comparison of *images* predictions with a reference."""

    images: int
    classes: Comparison
    confidences: Comparison

    @property
    def alarm(self) -> bool:
        """Whether one of both tests raises an alarm; without drift with a probability of `FALSE_ALARMS`."""
        return self.classes.alarm or self.confidences.alarm


class PredictionCounts:
    """Counts predictions by class and by confidence."""

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
            images=self.images,
            classes=compare(np.array(reference.classes), self.classes),
            confidences=compare(np.array(reference.confidences), self.confidences),
        )


def compare(first: Counts, second: Counts) -> Comparison:
    """Test whether the counts *first* (K,) and *second* (K,) come from one distribution."""
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
