"""What a few numbers allow to be said: intervals, paired differences, and whether two networks differ.

Wilson, "Probable Inference" (JASA 1927); Student's t through the incomplete beta function (its continued
fraction, Lentz's method); McNemar's test in its exact form, a sign test on the pictures that one network
alone gets right; a bootstrap over runs and pictures at once. Numbers only, nothing of this project.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEVIATIONS = 1.959964  # 95 % of a normal distribution lie within
LEVEL = 0.95
SMALLEST = 1e-300
TERMS = 10_000


class Interval(NamedTuple):
    """Where a true value is believed to lie, with 95 %."""

    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Say whether *value* may be the true one."""
        return self.low <= value <= self.high


class Paired(NamedTuple):
    """Differences of pairs: their mean, standard deviation (over n - 1), interval, and who was ahead."""

    mean: float
    sd: float
    interval: Interval
    wins: int
    ties: int
    losses: int


def wilson(agree: int, images: int) -> Interval:
    """Return Wilson's 95 % interval for a share of which *agree* of *images* were seen."""
    if images == 0:
        return Interval(0.0, 1.0)
    share, square = agree / images, DEVIATIONS**2
    centre = (share + square / (2 * images)) / (1 + square / images)
    spread = math.sqrt(share * (1 - share) / images + square / (4 * images**2))
    half = DEVIATIONS * spread / (1 + square / images)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation over n - 1 of *values*; 0 for the deviation of a single one."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def paired(differences: Sequence[float]) -> Paired:
    """Return what the *differences* of at least two pairs say, by Student's t.

    Equal differences have an interval of one point: a spread that was not seen is not made up.
    """
    if len(differences) < 2:
        raise ValueError("an interval needs two pairs at least")
    mean, sd = mean_and_sd(differences)
    half = t_quantile(0.5 + LEVEL / 2, len(differences) - 1) * sd / math.sqrt(len(differences))
    return Paired(
        mean=mean,
        sd=sd,
        interval=Interval(mean - half, mean + half),
        wins=sum(value > 0 for value in differences),
        ties=sum(value == 0 for value in differences),
        losses=sum(value < 0 for value in differences),
    )


def t_quantile(share: float, freedom: int) -> float:
    """Return where *share*, 0.5 to below 1, of Student's t with *freedom* degrees of freedom lies below."""
    if not 0.5 <= share < 1 or freedom < 1:
        raise ValueError(f"no quantile {share} of t with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while t_below(high, freedom) < share:
        low, high = high, 2 * high
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        low, high = (middle, high) if t_below(middle, freedom) < share else (low, middle)


def t_below(t: float, freedom: int) -> float:
    """Return the share of Student's t distribution below *t*, which is not negative."""
    return 1.0 - t_tail(t, freedom)


def t_tail(t: float, freedom: int) -> float:
    """Return the share of Student's t distribution above *t*, which is not negative, however small it is."""
    return 0.5 * beta_share(freedom / (freedom + t * t), freedom / 2, 0.5)


def beta_share(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges quickly
        return math.exp(logarithm) * beta_fraction(x, a, b) / a
    return 1.0 - math.exp(logarithm) * beta_fraction(1 - x, b, a) / b


def beta_fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction of the incomplete beta function."""
    c, d = 1.0, 1.0 / away_from_0(1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / away_from_0(1.0 + term * d)
            c = away_from_0(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value


def away_from_0(value: float) -> float:
    """Return *value*, or the smallest number that may be divided by."""
    return value if abs(value) > SMALLEST else SMALLEST


def mcnemar(only_first: int, only_second: int) -> float:
    """Return how probable so uneven a split is between equals: two-sided, exact.

    *only_first* pictures only one network gets right, *only_second* only the other one.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    logarithms = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(one) for one in logarithms))


def bootstrap(gain_SN: NDArray[np.int8], draws: int = 2000, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of *gain_SN* when runs and pictures are drawn again.

    Rows are seeds and columns are pictures: 1 where only the second network is right, -1 where only the
    first is, 0 elsewhere. Both are drawn with replacement, so that the interval holds for other seeds and
    other pictures. The same *seed* gives the same interval.
    """
    generator = np.random.default_rng(seed)
    seeds, pictures = gain_SN.shape
    wide_SN = gain_SN.astype(np.float64)
    even_S, even_N = np.full(seeds, 1 / seeds), np.full(pictures, 1 / pictures)
    means = [
        generator.multinomial(seeds, even_S) @ (wide_SN @ generator.multinomial(pictures, even_N))
        for _ in range(draws)
    ]
    low, high = np.quantile(np.asarray(means) / (seeds * pictures), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
