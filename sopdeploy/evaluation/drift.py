"""Drift: test whether new predictions have the same distribution as those of the held-out images.

Two tests compare how often each class is the most probable one, and how the largest
probabilities are distributed. Each is Pearson's chi-square test of homogeneity of two samples,
because the reference is itself a sample, often a small one. Categories that are rare in both
samples are merged, because the test needs an expected count of about 5 (Cochran, "Some methods
for strengthening the common chi-square tests", 1954).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import PredictionCounts, Reference

TESTS = ("classes", "confidences")  # attributes of `Reference` and `PredictionCounts`
SIGNIFICANCE = (
    0.005  # of each test: without drift, at most 1 % of comparisons raise an alarm (Bonferroni)
)
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
    tests = {
        name: compare_counts(np.array(getattr(reference, name)), getattr(counts, name))
        for name in TESTS
    }
    return Drift(counts.num_images, tests)


def compare_counts(first: _Counts, second: _Counts) -> Comparison:
    """Compare two samples, given as counts *first* (K,) and *second* (K,) of the same K categories.

    For the p-value, categories whose expected count in the smaller sample is below
    `MIN_EXPECTED` are merged into one, which is left out if it is empty. An empty sample has
    the distance 0 and the p-value 1.
    """
    counts_2K = np.stack([first, second]).astype(np.float64)
    sizes_21 = counts_2K.sum(axis=1, keepdims=True)
    if not sizes_21.all():
        return Comparison(0.0, 1.0)

    shares_2K = counts_2K / sizes_21
    distance = float(np.abs(shares_2K[0] - shares_2K[1]).sum() / 2)

    # Rare categories become one, so that each has enough expected images.
    is_rare_K = counts_2K.sum(axis=0) * sizes_21.min() / sizes_21.sum() < MIN_EXPECTED
    kept = counts_2K[:, ~is_rare_K]
    rest = counts_2K[:, is_rare_K].sum(axis=1, keepdims=True)
    merged_2M = np.concatenate([kept, rest], axis=1) if rest.any() else kept

    # if both have the same distribution
    expected_2M = sizes_21 * merged_2M.sum(axis=0) / sizes_21.sum()
    # Pearson's chi-square
    statistic = float((np.square(merged_2M - expected_2M) / expected_2M).sum())
    return Comparison(distance, chi_square_tail(statistic, degrees=merged_2M.shape[1] - 1))


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Approximate the probability of a larger *statistic* (Wilson and Hilferty, PNAS 1931)."""
    if degrees < 1:  # one category: nothing to compare
        return 1.0
    variance = 2.0 / (9.0 * degrees)
    # The cube root is nearly Gaussian.
    deviation = ((statistic / degrees) ** (1 / 3) - (1.0 - variance)) / math.sqrt(variance)
    return math.erfc(deviation / math.sqrt(2.0)) / 2.0
