"""Paired differences: mean, Student's t interval, wins, p, and what may be said of them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t


@dataclass(frozen=True, slots=True)
class Paired:
    """How much *ours* is above *other* on the same seeds, in points, with a 95 % interval of +- `half`.

    `half` and `p` (two-sided) are infinite and not a number for one seed.
    """

    n: int
    mean: float
    half: float
    wins: int
    p: float

    @property
    def verdict(self) -> str:
        """Return what the interval allows to be said; it is computed, never chosen."""
        if self.n < 2:
            return "one seed"
        if not abs(self.mean) > self.half:
            return "no effect detected"
        return f"{'better' if self.mean > 0 else 'worse'} by {abs(self.mean):.2f} +- {self.half:.2f}"


def paired(ours: Sequence[float], other: Sequence[float]) -> Paired:
    """Return the paired difference ours - other, element by element (seed by seed)."""
    differences = [a - b for a, b in zip(ours, other, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    wins = sum(difference > 0 for difference in differences)
    if n < 2:
        return Paired(n, mean, math.inf, wins, math.nan)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Paired(n, mean, 0.0, wins, 1.0 if mean == 0 else 0.0)
    return Paired(
        n, mean, float(t.ppf(0.975, n - 1)) * error, wins, float(2 * t.sf(abs(mean) / error, n - 1))
    )
