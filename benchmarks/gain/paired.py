"""Paired differences: mean, interval, wins and p-value."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


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


def crossed(ours: np.ndarray, other: np.ndarray) -> Paired:
    """Compute the paired difference of answers (draws, images): 1 right, 0 wrong, NaN not tested.

    The draws share their test images. The variance is that of draws plus that of images, each
    with its own effect (Cameron, Gelbach, Miller, "Robust Inference with Multiway Clustering",
    2011); the degrees of freedom are Satterthwaite's, with draws - 1 for the part of the draws.
    """
    differences = 100 * (ours - other)
    n, count = len(differences), np.isfinite(differences).sum()
    mean = float(np.nanmean(differences))
    wins = int((np.nanmean(differences, axis=1) > 0).sum())
    if n < 2:
        return Paired(n, mean, math.inf, wins, math.nan)
    residuals = np.nan_to_num(differences - mean)
    noise = (residuals**2).sum()
    of_draws = max(noise, n / (n - 1) * (residuals.sum(axis=1) ** 2).sum()) / count**2
    of_images = n / (n - 1) * max(0.0, (residuals.sum(axis=0) ** 2).sum() - noise) / count**2
    if of_draws == 0:  # all differences are equal
        return Paired(n, mean, 0.0, wins, 1.0 if mean == 0 else 0.0)
    error, freedom = math.sqrt(of_draws + of_images), (n - 1) * (1 + of_images / of_draws) ** 2
    return Paired(
        n,
        mean,
        float(t.ppf(0.975, freedom)) * error,
        wins,
        2 * float(t.sf(abs(mean) / error, freedom)),
    )
