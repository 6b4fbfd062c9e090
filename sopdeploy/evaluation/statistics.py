"""Confidence intervals and significance tests for comparing classifiers.

scipy is imported inside the functions that need it, because installations without it use Wilson's interval.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964  # 97.5 % quantile of the normal distribution
LEVEL = 0.95


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


class Paired(NamedTuple):
    """Paired differences: mean, standard deviation (over n - 1), interval of the mean.

    `wins`, `ties` and `losses` count the positive, zero and negative differences.
    """

    mean: float
    sd: float
    interval: Interval
    wins: int
    ties: int
    losses: int


def wilson(successes: int, trials: int) -> Interval:
    """Compute the score interval of a proportion (Wilson, "Probable Inference", JASA 1927)."""
    if trials == 0:
        return Interval(0.0, 1.0)
    fraction, square = successes / trials, Z_95**2
    center = (fraction + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(fraction * (1 - fraction) / trials + square / (4 * trials**2))
    half = Z_95 * spread / (1 + square / trials)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def paired(differences: Sequence[float]) -> Paired:
    """Compute Student's t interval of the mean of at least two paired *differences*.

    Raises:
        ValueError: If there are fewer than two differences.
    """
    from scipy.stats import t  # noqa: PLC0415  # not part of the base installation

    if len(differences) < 2:
        raise ValueError("an interval needs at least two pairs")
    mean, sd = fmean(differences), stdev(differences)
    half = float(t.ppf(0.5 + LEVEL / 2, len(differences) - 1)) * sd / math.sqrt(len(differences))
    return Paired(
        mean=mean,
        sd=sd,
        interval=Interval(mean - half, mean + half),
        wins=sum(value > 0 for value in differences),
        ties=sum(value == 0 for value in differences),
        losses=sum(value < 0 for value in differences),
    )


def bootstrap(gain_SN: NDArray[np.int8], draws: int = 2000, seed: int = 0) -> Interval:
    """Compute the percentile bootstrap interval of the mean of *gain_SN* over seeds and images.

    Rows are training seeds and columns images: 1 where only the second network is correct, -1 where only the
    first is, 0 elsewhere. Rows and columns are both resampled with replacement: the interval holds for other
    seeds and other images.
    """
    generator = np.random.default_rng(seed)
    seeds, images = gain_SN.shape
    wide_SN = gain_SN.astype(np.float64)
    even_S, even_N = np.full(seeds, 1 / seeds), np.full(images, 1 / images)
    means = [
        generator.multinomial(seeds, even_S) @ (wide_SN @ generator.multinomial(images, even_N))
        for _ in range(draws)
    ]
    low, high = np.quantile(np.asarray(means) / (seeds * images), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
