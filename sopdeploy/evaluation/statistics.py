"""Confidence intervals, and tests that compare two classifiers by the images on which only one is right.

`wins` counts the images on which only the second classifier is right, `losses` those on which
only the first is; the difference of the accuracies is (wins - losses) / images. The images must
be independent.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from sopdeploy.evaluation.metrics import Z_95, Interval

LEVEL = 0.95


def student(values: Sequence[float]) -> Interval:
    """Compute Student's t interval of the mean of at least two *values*."""
    from scipy.stats import t  # noqa: PLC0415  # not part of the base installation

    half = (
        float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    )
    return Interval(fmean(values) - half, fmean(values) + half)


ALPHA = 0.05
Z_90 = 1.644854  # 95 % quantile of the normal distribution, for a 90 % interval
# With this quantile (4 % for many images), a classifier that is worse by the tolerance is "not
# worse" with a probability of at most 5 % for any number of images: the tests enumerate it.
Z_NOT_WORSE = 1.75
Z_POWER = 0.8416  # 80 % quantile of the normal distribution
# by which a classifier that is "not worse" may be worse, unless a user gives another one
TOLERANCE = 0.01
# With fewer images on which only one classifier is right, no McNemar test reaches 5 %
TESTABLE = 6

Verdict = Literal["better", "not worse", "worse", "undecided"]


def mcnemar(wins: int, losses: int) -> float:
    """Compute the exact two-sided p-value of equal accuracies (McNemar, Psychometrika 1947)."""
    trials = wins + losses
    larger = max(wins, losses)
    if trials == 0:
        return 1.0

    # The tail of the binomial distribution with probability 1/2, from integers: both sides, so
    # 2 / 2**trials.
    binomial = math.comb(trials, larger)
    tail = 0
    for successes in range(larger, trials + 1):
        tail += binomial
        binomial = binomial * (trials - successes) // (successes + 1)

    return min(1.0, tail / 2 ** (trials - 1))


def score_statistic(wins: int, losses: int, images: int, difference: float) -> float:
    """Compute how many standard deviations (wins - losses) / images is above a *difference* in (-1, 1).

    The variance is that of the most likely shares with this difference (Tango, "Equivalence
    Test and Confidence Interval for the Difference in Proportions for the Paired-Sample
    Design", 1998, Eq. 6 and 7).
    """
    # Only the first classifier is right on a share x of the images, only the second on x +
    # difference. The most likely x maximizes x^losses (x + difference)^wins (1 - 2 x -
    # difference)^others: it is the larger root of 2 images x^2 + linear x + constant.
    linear = (2 * images - wins + losses) * difference - wins - losses
    constant = -losses * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear**2 - 8 * images * constant)) - linear) / (4 * images)

    # If wins = losses = difference = 0, the variance is 0, and the result 0.
    variance = images * (2 * share + difference * (1 - difference))
    return (wins - losses - images * difference) / math.sqrt(max(variance, 1e-12))


def difference_interval(
    wins: int, losses: int, images: int, quantile: float = Z_95
) -> Interval:
    """Compute the interval of the difference, of 95 %: the values that `score_statistic` does not reject."""
    low = bound_difference(wins, losses, images, -1.0, quantile)
    high = bound_difference(wins, losses, images, 1.0, quantile)
    return Interval(low, high)


def bound_difference(
    wins: int, losses: int, images: int, limit: float, quantile: float
) -> float:
    """Find the difference nearest to *limit*, -1 or 1, that the score test with *quantile* does not reject."""
    accepted = (wins - losses) / images
    rejected = limit
    for _ in range(50):  # bisection
        middle = (accepted + rejected) / 2
        if abs(score_statistic(wins, losses, images, middle)) < quantile:
            accepted = middle
        else:
            rejected = middle
    return accepted


def decide(wins: int, losses: int, images: int, tolerance: float) -> Verdict:
    """Compare the second classifier with the first; "not worse" means worse by less than *tolerance*.

    If it is worse by at least *tolerance*, the result is "better" or "not worse" in at most 5 %
    of cases.
    """
    p = mcnemar(wins, losses)  # of the hypothesis that both accuracies are equal
    if wins > losses and p <= ALPHA:
        return "better"
    if score_statistic(wins, losses, images, -tolerance) >= Z_NOT_WORSE:  # above -tolerance
        return "not worse"
    return "worse" if losses > wins and p <= ALPHA else "undecided"


def passing_gain(changed: float, images: int, tolerance: float) -> float:
    """Estimate the true gain from which `difference_interval` with `Z_90` stays above -*tolerance* in 80 % of cases.

    *changed* is the share of the *images* on which only one of the two classifiers is right. The result is a
    share, at least -*tolerance* and at most 1.
    """
    return min(1.0, (Z_90 + Z_POWER) * math.sqrt(changed / images) - tolerance)


def smallest_difference(wins: int, losses: int, images: int) -> float:
    """Estimate the difference of accuracies that `mcnemar` finds in 80 % of cases, at this rate of changes.

    It is at least `TESTABLE` of the *images*, and at most 1.
    """
    # The variance of 1 for a win, -1 for a loss and 0 otherwise, which is never 0.
    variance = (wins + losses + 1) / (images + 2)
    return min(1.0, max(TESTABLE / images, (Z_95 + Z_POWER) * math.sqrt(variance / images)))
