"""The threshold of energies below which an image counts as unknown, and how many new images it accepts.

It is a quantile of the energies of known images with the correction of split conformal
prediction (Angelopoulos and Bates, 2021, section 1). The lowest ones of few cosines say little
about a quantile, so that the threshold of few is a prediction bound of the normal distribution
(Hahn and Meeker, "Statistical Intervals", 1991, section 4.8).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.evaluation.statistics import LEVEL

# Smallest rank of a threshold among cosines, which 5 % of 100 images have; with fewer images, the
# threshold is a prediction bound
MIN_RANK = 5
# Share of new images below this bound, of those that may be rejected: known images have more low
# cosines than a normal distribution (docs/benchmarks/other_photos.md of commit 2753e7ecf).
BOUND_SHARE = 0.8
GRID = 60  # quantiles of each estimate over which probabilities are averaged


class Threshold(NamedTuple):
    """The `value` of a threshold, and the 95 % interval of the share of as many new images that it accepts."""

    value: float
    accepted: tuple[float, float]


def choose_threshold(
    energies_N: NDArray[np.float64], accepts: float, *, are_cosines: bool
) -> Threshold | None:
    """Choose the threshold of known images' *energies_N* that accepts the share *accepts* of new ones.

    It is one of the energies, by rank. If *are_cosines* and there are too few for a rank of
    `MIN_RANK`, it is a prediction bound. None if *accepts* is 1 or, for energies that are not
    cosines, too large for so few images.
    """
    count = len(energies_N)
    rank = threshold_rank(count, accepts)
    if are_cosines and rank < MIN_RANK and accepts < 1:
        return bound_cosines(energies_N, accepts)
    if rank == 0:
        return None
    return Threshold(float(np.sort(energies_N)[rank - 1]), accepted_interval(count, rank))


def bound_cosines(cosines_N: NDArray[np.float64], accepts: float) -> Threshold:
    """Compute the prediction bound of normally distributed *cosines_N*, mean - t s sqrt(1 + 1 / N).

    A new cosine is below it with the probability `BOUND_SHARE` (1 - *accepts*). Of N new images,
    the number of accepted ones is binomial. Its probability depends on two errors: that of the mean,
    which is normally distributed, and that of the deviation s, whose square has a chi-square
    distribution. The binomial distribution is averaged over `GRID` quantiles of each error.
    """
    from scipy.special import bdtr, chdtri, ndtr, ndtri, stdtrit  # noqa: PLC0415 # a quarter of a second

    # The bound itself.
    count = len(cosines_N)
    quantile = float(stdtrit(count - 1, 1 - BOUND_SHARE * (1 - accepts)))
    deviations = quantile * math.sqrt(1 + 1 / count)
    bound = float(cosines_N.mean() - deviations * cosines_N.std(ddof=1))

    # The probability (G, G) of accepting a new image, by the errors of mean and deviation.
    levels_G = (np.arange(GRID) + 0.5) / GRID
    errors_G1 = ndtri(levels_G)[:, None] / math.sqrt(count)
    deviations_G = np.sqrt(chdtri(count - 1, levels_G) / (count - 1))
    probabilities_GG = ndtr(deviations * deviations_G - errors_G1)

    # The distribution of the number of accepted images.
    cumulative = [float(bdtr(k, count, probabilities_GG).mean()) for k in range(count + 1)]
    low, high = np.searchsorted(cumulative, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Threshold(bound, (low / count, min(count, high) / count))


def threshold_rank(images: int, accepts: float) -> int:
    """Return the rank of the threshold among the energies of so many *images*: 1 is the lowest, 0 none.

    A new known image has an energy below that of rank k, and so is rejected, with a probability
    of at most k / (images + 1). The result is the largest k for which this is at most 1 -
    *accepts*.
    """
    # 1e-9 corrects floats, in which 10 * (1 - 0.9) is below 1.
    rank = math.floor((images + 1) * (1 - accepts) + 1e-9)
    return min(images, rank)  # *accepts* = 0 gives images + 1


def accepted_interval(images: int, rank: int) -> tuple[float, float]:
    """Compute the 95 % interval of the fraction of new known images that the threshold accepts.

    The threshold is the energy with this *rank*, from the lowest, among those of so many *images*.
    Of as many new images, the number of accepted ones has a beta-binomial distribution (Marques
    F., arXiv 2303.02770, 2023): both the threshold and the share of a finite number of new images
    vary.
    """
    from scipy.special import betaln  # noqa: PLC0415 # SciPy takes a quarter of a second

    # The accepted share has a beta distribution with these parameters.
    a = images - rank + 1
    b = rank

    # n new images, of which k are accepted, from 0 to n.
    n = images
    k = np.arange(images + 1)

    # The beta-binomial distribution of the number of accepted images.
    # P(k) = C(n, k) B(k + a, n - k + b) / B(a, b), where C(n, k) = 1 / ((n + 1) B(n - k + 1, k
    # + 1))
    log_ratio = betaln(k + a, n - k + b) - betaln(a, b)
    log_coefficient = -np.log(n + 1) - betaln(n - k + 1, k + 1)
    cumulative = np.cumsum(np.exp(log_ratio + log_coefficient))  # P(at most k are accepted)

    low, high = np.searchsorted(cumulative, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low / n, high / n
