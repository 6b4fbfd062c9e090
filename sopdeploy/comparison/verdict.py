"""Compare recipes statistically by their correct predictions per seed and image."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.evaluation.statistics import paired

NO_EFFECT = "no effect detected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Results of one recipe: `correct` (seeds, images) is true where the last epoch's network is right."""

    name: str
    model: str
    correct: NDArray[np.bool_]


class Arm(StrictModel):
    """The top-1 accuracies of a recipe by seed, and their mean and sample standard deviation."""

    name: str
    model: str
    top1: tuple[float, ...]
    mean: float
    sd: float


class Pair(StrictModel):
    """Top-1 of `second` minus top-1 of `first`, paired by seed, as fractions.

    `low` and `high` are Student's 95 % interval over seeds, which decides the verdict. `wins`, `ties` and
    `losses` count seeds.
    """

    first: str
    second: str
    differences: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    verdict: str


class Comparison(StrictModel):
    """The comparison of all other recipes with the first one; `images` is the number of held-out images."""

    seeds: tuple[int, ...]
    images: int
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]


def compare_results(seeds: Sequence[int], results: Sequence[Results]) -> Comparison:
    """Compare at least two *results*, of the same images and *seeds*."""
    arms = []
    for result in results:
        top1 = [int(row.sum()) / len(row) for row in result.correct]
        mean, sd = fmean(top1), stdev(top1)
        arms.append(Arm(name=result.name, model=result.model, top1=tuple(top1), mean=mean, sd=sd))
    return Comparison(
        seeds=tuple(seeds),
        images=results[0].correct.shape[1],
        arms=tuple(arms),
        pairs=tuple(_compare_pair(results[0], other) for other in results[1:]),
    )


def _compare_pair(first: Results, second: Results) -> Pair:
    gain_SN = second.correct.astype(np.int8) - first.correct.astype(np.int8)
    differences = [int(row.sum()) / len(row) for row in gain_SN]
    change = paired(differences)._asdict()
    mean, (low, high) = change["mean"], change.pop("interval")
    verdict = NO_EFFECT
    if low > 0 or high < 0:
        verdict = (
            f"{second.name} is {'better' if mean > 0 else 'worse'} than {first.name} by "
            f"{100 * abs(mean):.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
        )
    return Pair(
        first=first.name,
        second=second.name,
        differences=tuple(differences),
        **change,
        low=low,
        high=high,
        verdict=verdict,
    )
