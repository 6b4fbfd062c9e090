"""The measured results of runs: what is stored beside each run, and mean errors over seeds."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from sopdeploy.config import Fraction, StrictModel
from sopdeploy.evaluation.statistics import Interval, paired, wilson
from sopdeploy.models.stats import Counts as NetworkCounts
from sopdeploy.training.diagnostics import EpochRow

HOURS, MILLISECONDS = "training, hours", "inference, ms per image"  # facts of tables


class HeadError(StrictModel):
    """Errors of one head on the held-out images, and its share of the sum of weighted losses."""

    top1: Fraction
    top5: Fraction
    share: Fraction


class SeedResult(StrictModel):
    """One finished run.

    `recipe` is the complete recipe and `network` the complete config of its network; `training` and
    `deployed` count this network. `heads` holds the errors of all heads if there are several. `usage` counts,
    for a gated network, the training images that each component received in the last epoch. `condition` holds
    the ratios of the largest to the smallest recorded eigenvalue before and after each matrix function.
    `milliseconds` is the time of the deployed network per image, where the paper prints one.
    """

    seed: int
    recipe: dict[str, Any]
    network: dict[str, Any]
    history: tuple[EpochRow, ...]
    train_count: int
    held_out_count: int
    training: NetworkCounts
    deployed: NetworkCounts
    heads: dict[str, HeadError]
    usage: tuple[int, ...]
    condition: dict[str, tuple[float, float]]
    milliseconds: float | None = None
    machine: dict[str, Any]

    @property
    def images_per_second(self) -> float:
        """The median training throughput over the epochs."""
        rates = sorted(row.speed.images_per_second for row in self.history if row.speed)
        return rates[len(rates) // 2] if rates else 0.0


class MeanError(StrictModel):
    """A mean over seeds with its 95 % interval: Student's t over seeds, Wilson's over images for one seed."""

    mean: float
    low: float
    high: float


def measure_errors(runs: Sequence[SeedResult], name: str) -> MeanError | None:
    """Compute the mean error *name*, "top1" or "top5", of *runs* after the last epoch, in percent."""
    errors = [1 - getattr(run.history[-1].metrics, name) for run in runs]
    if not errors:
        return None
    if len(errors) > 1:
        of_seeds = paired(errors)
        mean, interval = of_seeds.mean, of_seeds.interval
    else:
        mean = errors[0]
        count = runs[0].held_out_count
        interval = Interval(*wilson(round(mean * count), count))
    return MeanError(mean=100 * mean, low=100 * max(0.0, interval.low), high=100 * min(1.0, interval.high))


def measure_facts(runs: Sequence[SeedResult], baseline: Sequence[SeedResult]) -> dict[str, float]:
    """Compute the facts of *runs* that papers print: times, and increments over *baseline* in points."""
    facts = {HOURS: mean(run.history[-1].seconds for run in runs) / 3600}
    times = [run.milliseconds for run in runs if run.milliseconds is not None]
    if times:
        facts[MILLISECONDS] = mean(times)
    for name, label in {"top1": "top-1 increment", "top5": "top-5 increment"}.items():
        error, reference = measure_errors(runs, name), measure_errors(baseline, name)
        if error is not None and reference is not None:
            facts[label] = reference.mean - error.mean
    return facts
