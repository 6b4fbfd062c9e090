"""Confidence intervals and significance tests for comparing classifiers.

scipy is imported inside the functions that need it, because installations without it use Wilson's interval.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

Z_95 = 1.959964  # 97.5 % quantile of the normal distribution
LEVEL = 0.95


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(successes: float, trials: float) -> Interval:
    """Compute the score interval of a proportion (Wilson, "Probable Inference", JASA 1927)."""
    if trials == 0:
        return Interval(0.0, 1.0)
    fraction, square = successes / trials, Z_95**2
    center = (fraction + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(fraction * (1 - fraction) / trials + square / (4 * trials**2))
    half = Z_95 * spread / (1 + square / trials)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def student(values: Sequence[float]) -> Interval:
    """Compute Student's t interval of the mean of at least two *values*."""
    from scipy.stats import t  # noqa: PLC0415  # not part of the base installation

    half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)
