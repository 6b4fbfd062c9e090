"""From right and wrong answers, by recipe, seed and picture, to what may be said of the recipes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.evaluation.statistics import bootstrap, mcnemar, mean_and_sd, paired

NO_EFFECT = "no effect detected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What one recipe gave: `right` (seeds, pictures), true where the last epoch's first answer is."""

    name: str
    model: str
    right: NDArray[np.bool_]


class Arm(StrictModel):
    """One recipe: top-1 of the last epoch by seed, mean, and deviation over seeds less one."""

    name: str
    model: str
    top1: tuple[float, ...]
    mean: float
    sd: float


class Split(StrictModel):
    """One seed: pictures that only one of two networks gets right, and McNemar's exact p."""

    seed: int
    only_first: int
    only_second: int
    p: float


class Pair(StrictModel):
    """The recipe `second` less the recipe `first`, paired by seed, in shares of the pictures.

    `low` and `high` are Student's 95 % interval over seeds, which the verdict follows; `bootstrap_low` and
    `bootstrap_high` come from drawing seeds and pictures again.
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
    mcnemar: tuple[Split, ...]
    bootstrap_low: float
    bootstrap_high: float
    verdict: str


class Comparison(StrictModel):
    """Recipes over the same seeds; every other one is compared with the first."""

    seeds: tuple[int, ...]
    pictures: int
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]


def judge(seeds: Sequence[int], results: Sequence[Results]) -> Comparison:
    """Return what *results*, of the same pictures and *seeds*, two at least, allow to be said."""
    first, *others = results
    return Comparison(
        seeds=tuple(seeds),
        pictures=first.right.shape[1],
        arms=tuple(arm(one) for one in results),
        pairs=tuple(pair(seeds, first, other) for other in others),
    )


def arm(found: Results) -> Arm:
    """Return the figures of one recipe alone."""
    top1 = shares(found)
    mean, sd = mean_and_sd(top1)
    return Arm(name=found.name, model=found.model, top1=tuple(top1), mean=mean, sd=sd)


def shares(found: Results) -> list[float]:
    """Return top-1 by seed."""
    return [int(row.sum()) / len(row) for row in found.right]


def pair(seeds: Sequence[int], first: Results, second: Results) -> Pair:
    """Return how *second* differs from *first*."""
    gain_SN = second.right.astype(np.int8) - first.right.astype(np.int8)
    differences = [int(row.sum()) / len(row) for row in gain_SN]
    found, drawn = paired(differences), bootstrap(gain_SN)
    splits = []
    for seed, row in zip(seeds, gain_SN, strict=True):
        worse, better = int((row < 0).sum()), int((row > 0).sum())
        splits.append(Split(seed=seed, only_first=worse, only_second=better, p=mcnemar(worse, better)))
    verdict = NO_EFFECT
    if not found.interval.covers(0.0):
        side = "better" if found.mean > 0 else "worse"
        verdict = (
            f"{second.name} is {side} than {first.name} by {100 * abs(found.mean):.2f} points "
            f"({100 * found.interval.low:+.2f} to {100 * found.interval.high:+.2f})"
        )
    return Pair(
        first=first.name,
        second=second.name,
        differences=tuple(differences),
        mean=found.mean,
        sd=found.sd,
        low=found.interval.low,
        high=found.interval.high,
        wins=found.wins,
        ties=found.ties,
        losses=found.losses,
        mcnemar=tuple(splits),
        bootstrap_low=drawn.low,
        bootstrap_high=drawn.high,
        verdict=verdict,
    )
