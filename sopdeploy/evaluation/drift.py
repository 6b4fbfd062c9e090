"""Drift: test whether new predictions have the same distribution as those of the held-out images.

Two tests compare how often each class is the most probable one, and how the largest probabilities are
distributed. Each is Pearson's chi-square test of homogeneity of two samples, because the reference is itself
a sample, often a small one. Categories that are rare in both samples are merged, because the test needs an
expected count of about 5 (Cochran, "Some methods for strengthening the common chi-square tests", 1954).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import PredictionCounts, Reference

TESTS = ("classes", "confidences")  # attributes of `Reference` and `PredictionCounts`
SIGNIFICANCE = 0.005  # of each test: without drift, at most 1 % of comparisons raise an alarm (Bonferroni)
MIN_EXPECTED = 5.0

_Counts = NDArray[np.int64]


class Comparison(NamedTuple):
    """Result of one test: total variation *distance* in [0, 1] of two samples, *p_value* of homogeneity."""

    distance: float
    p_value: float


class Drift(NamedTuple):
    """Comparison of the predictions of *num_images* images with a reference: two *tests*, by name."""

    num_images: int
    tests: dict[str, Comparison]


def find_drift(counts: PredictionCounts, reference: Reference) -> Drift:
    """Compare *counts* with *reference*, which must have the same classes."""
    tests = {name: compare(np.array(getattr(reference, name)), getattr(counts, name)) for name in TESTS}
    return Drift(counts.num_images, tests)


def compare(first: _Counts, second: _Counts) -> Comparison:
    """Compare two samples, given as counts *first* (K,) and *second* (K,) of the same K categories.

    Rare categories are merged for the p-value. An empty sample has the distance 0 and the p-value 1.
    """
    counts_2K = np.stack([first, second]).astype(np.float64)
    sizes_21 = counts_2K.sum(axis=1, keepdims=True)
    if not sizes_21.all():
        return Comparison(0.0, 1.0)
    shares_2K = counts_2K / sizes_21
    distance = float(np.abs(shares_2K[0] - shares_2K[1]).sum() / 2)
    merged_2M = _merge_rare(counts_2K)
    expected_2M = sizes_21 * merged_2M.sum(axis=0) / sizes_21.sum()  # if both have the same distribution
    statistic = float((np.square(merged_2M - expected_2M) / expected_2M).sum())  # Pearson's chi-square
    return Comparison(distance, chi_square_tail(statistic, degrees=merged_2M.shape[1] - 1))


def _merge_rare(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Merge the rare categories of *counts* (2, K) into one last column; leave it out if it has no counts.

    A category is rare if its expected count in the smaller sample is below `MIN_EXPECTED`.
    """
    sizes = counts.sum(axis=1)
    expected_in_smaller = counts.sum(axis=0) * sizes.min() / sizes.sum()
    rare = expected_in_smaller < MIN_EXPECTED
    kept, rest = counts[:, ~rare], counts[:, rare].sum(axis=1, keepdims=True)
    return np.concatenate([kept, rest], axis=1) if rest.sum() else kept


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Approximate the probability of a larger *statistic* (Wilson and Hilferty, PNAS 1931)."""
    if degrees < 1:  # one category: nothing to compare
        return 1.0
    variance = 2.0 / (9.0 * degrees)
    # The cube root is nearly Gaussian.
    deviation = ((statistic / degrees) ** (1 / 3) - (1.0 - variance)) / math.sqrt(variance)
    return math.erfc(deviation / math.sqrt(2.0)) / 2.0
