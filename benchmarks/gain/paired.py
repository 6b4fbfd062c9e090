"""Paired differences: mean, Student's t interval, wins and p-value."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ttest_rel


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean difference ours - other over the same seeds in percentage points; 95 % interval +- `half`.

    `p` is two-sided. For a single seed, `half` is infinite and `p` is NaN.
    """

    n: int
    mean: float
    half: float
    wins: int
    p: float


def paired(ours: Sequence[float], other: Sequence[float]) -> Paired:
    """Compute the paired difference ours - other, element by element (seed by seed)."""
    differences = [a - b for a, b in zip(ours, other, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    wins = sum(difference > 0 for difference in differences)
    if n < 2:
        return Paired(n, mean, math.inf, wins, math.nan)
    if len(set(differences)) == 1:
        return Paired(n, mean, 0.0, wins, 1.0 if mean == 0 else 0.0)
    test = ttest_rel(ours, other)
    return Paired(n, mean, float(test.confidence_interval().high) - mean, wins, float(test.pvalue))
