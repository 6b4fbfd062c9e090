"""The measured results of a reproduction, as stored and as printed with `--json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.config import Fraction, StrictModel
from sopdeploy.evaluation.statistics import Interval, paired, wilson
from sopdeploy.models.stats import Counts as NetworkCounts
from sopdeploy.reproduction.options import Scale
from sopdeploy.reproduction.plan import Counts
from sopdeploy.reproduction.tables import Measures, PrintedRow
from sopdeploy.training.diagnostics import EpochRow


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


class RowResult(StrictModel):
    """The printed figures of a row beside the measured ones; errors are percentages.

    `status` is "measured", "not run" or the reason for which the row cannot be run. `command` trains the row
    alone with the first seed. `network` is the catalog name of the trained network. `facts` are the counted
    or timed figures, by the names of `PrintedRow.facts`.
    """

    printed: PrintedRow
    status: str
    command: str = ""
    counted: Counts | None = None
    facts: dict[str, float] = pydantic.Field(default_factory=dict)
    network: str = ""
    top1: MeanError | None = None
    top5: MeanError | None = None
    runs: tuple[SeedResult, ...] = ()


class Reproduction(StrictModel):
    """A table with the results so far; `statement` explains why small-scale results are not the paper's."""

    table: str
    source: str
    title: str
    scale: Scale
    measures: Measures = "errors"
    statement: str
    seeds: int
    data: str | None
    page: Path
    rows: tuple[RowResult, ...]

    def summary(self) -> dict[str, Any]:
        """Return the result without the epochs of the runs and their recipes, for `--json`."""
        runs = {"recipe": True, "network": True, "history": True, "machine": True}
        return self.model_dump(mode="json", exclude={"rows": {"__all__": {"runs": {"__all__": runs}}}})


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
