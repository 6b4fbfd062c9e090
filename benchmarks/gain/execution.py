"""Execute many runs on one thread, each written at once; choose rates; print progress."""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from gain.study import Study
from gain.train_and_measure import Outcome, Run, train_and_measure
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write

SEARCH_SEEDS = range(100, 105)  # of no draw that is evaluated
# points; a rate so far behind after some draws of the search is not tried on the others
HOPELESS = 20.0
Planned = tuple[str, str, Run]  # images, arm, run
Results = dict[str, dict[str, list["Line"]]]  # by study and arm, in the order of the seeds


class Line(Outcome):
    """The outcome of an arm on a draw of *images*; `key` names all inputs of the run."""

    images: str
    arm: str
    seed: int
    rate: float
    date: str
    key: str


class Lines:
    """The file of finished runs; unless *may_run*, others are a `ConfigError`."""

    def __init__(self, path: Path | None, *, may_run: bool = True) -> None:
        self.path, self.may_run = path, may_run
        texts = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        lines = [Line.model_validate_json(text) for text in texts]
        self.by_run = {(line.images, line.key): line for line in lines}

    def find(self, planned: Planned) -> Line | None:
        """Look up the line of a run."""
        images, _, run = planned
        return self.by_run.get((images, run.key))

    def run(self, planned: Sequence[Planned]) -> list[Line]:
        """Read or execute the runs of *planned*; write the line of each as soon as it is finished."""
        missing = {(one[0], one[2].key): one for one in planned if self.find(one) is None}
        if missing and not self.may_run:
            images, arm, run = next(iter(missing.values()))
            raise ConfigError(
                f"{self.path}: has no draw {run.seed} of {images}, {arm}; omit --report"
            )
        for number, (images, arm, run) in enumerate(missing.values(), 1):
            outcome = train_and_measure(run)
            self.by_run[images, run.key] = line = Line(
                images=images,
                arm=arm,
                seed=run.seed,
                rate=run.learning_rate,
                date=datetime.now(UTC).date().isoformat(),
                key=run.key,
                **dict(outcome),
            )
            if self.path is not None:
                with atomic_write(self.path) as partial:
                    rows = (
                        one.model_dump_json(exclude_defaults=True)
                        for one in self.by_run.values()
                    )
                    partial.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
            print(
                f"[{number}/{len(missing)}] {images}, draw {run.seed}, {arm}, rate {run.learning_rate:g}: "
                f"{line.accuracy:.2f} % in {line.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return [self.by_run[images, run.key] for images, _, run in planned]


def choose_rates(
    studies: Sequence[Study], lines: Lines, seeds: Sequence[int]
) -> dict[str, float]:
    """Choose the learning rate of each arm that *studies* search, which is the same for all of them.

    They train on *seeds*. The largest mean accuracy decides, of equal ones the smallest log loss,
    then the smallest rate. A grid whose best rate is on its edge becomes wider; with `--report`,
    only if those draws are finished.
    """
    first = studies[0]

    def planned(study: Study, arm: str, rate: float, seed: int) -> Planned:
        return study.images, arm, study.run(arm, seed, learning_rate=rate)

    def best_rate(arm: str, rates: Sequence[float]) -> float:
        found: dict[float, list[Line]] = {rate: [] for rate in rates}
        for seed in seeds:
            for study in studies:
                runs = lines.run([planned(study, arm, rate, seed) for rate in found])
                for before, line in zip(found.values(), runs, strict=True):
                    before.append(line)

            # What is hopeless is not tried on the other seeds.
            least = max(map(mean_accuracy, found.values())) - HOPELESS
            found = {
                rate: before for rate, before in found.items() if mean_accuracy(before) >= least
            }
        return min(
            found,
            key=lambda rate: (-mean_accuracy(found[rate]), mean_log_loss(found[rate]), rate),
        )

    chosen = {}
    for arm in first.search:
        rates = sorted(first.rates)
        best = best_rate(arm, rates)
        while best in (rates[0], rates[-1]):
            rates = sorted([*rates, neighbor(best, below=best != rates[-1])])
            try:
                best = best_rate(arm, rates)
            except ConfigError:  # with --report: not all draws of the wider grid are finished
                if lines.may_run:
                    raise
                print(
                    f"{first.name}: {arm}: the best rate is on the edge of the grid",
                    file=sys.stderr,
                )
                break
        chosen[arm] = best
    return chosen | {arm: chosen[other] for arm, other in first.rate_of.items()}


def mean_accuracy(runs: Sequence[Line]) -> float:
    """Return the mean accuracy of *runs* in percent."""
    return fmean(one.accuracy for one in runs)


def mean_log_loss(runs: Sequence[Line]) -> float:
    """Return the mean log loss of *runs*; infinity if that of one is unknown."""
    return fmean(math.inf if one.log_loss is None else one.log_loss for one in runs)


def neighbor(rate: float, *, below: bool) -> float:
    """Return the next rate of 1, 3, 10, 30 and so on times a power of ten."""
    mantissa, exponent = f"{rate:e}".split("e")
    is_one = float(mantissa) < 2
    power = (
        int(exponent) - 1 if below and is_one else int(exponent) + (not below and not is_one)
    )
    return float(f"{3 if is_one else 1}e{power}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of runs."""
    parser.add_argument(
        "--lines", type=Path, help="file with a line per finished run; those are not repeated"
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="number of draws, the seeds 0, 1 and so on (3)"
    )
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[4], help="lengths of training (4)"
    )
    parser.add_argument(
        "--search-draws", type=int, default=5, help="to choose rates with (5); 0: no choice"
    )
    parser.add_argument(
        "--report", action="store_true", help="print the finished draws, and run nothing"
    )


def run_studies(
    studies: Sequence[Study], given: argparse.Namespace
) -> tuple[list[Study], Results]:
    """Choose rates, and run all arms of all studies, draw by draw.

    Returns the studies with their rates, and the outcomes of the draws that all arms have.
    """
    lines, seeds = (
        Lines(given.lines, may_run=not given.report),
        SEARCH_SEEDS[: given.search_draws],
    )
    # Studies that share their rates are one group; others are groups of their own.
    groups: dict[str, list[Study]] = {}
    for one in studies:
        groups.setdefault(one.rates_for or one.name, []).append(one)

    rates: dict[str, dict[str, float]] = {}
    for group, members in groups.items():
        deciding = [one for one in members if one.decides]
        rates[group] = choose_rates(deciding, lines, seeds) if seeds else {}

    chosen = []
    for one in studies:
        arms = {
            arm: {**one.arms[arm], "learning_rate": rate}
            for arm, rate in rates[one.rates_for or one.name].items()
        }
        chosen.append(dataclasses.replace(one, arms={**one.arms, **arms}))
    if not given.report:
        order = itertools.zip_longest(*([(one, seed) for seed in one.seeds] for one in chosen))
        pairs = [pair for draw in order for pair in draw if pair is not None]
        lines.run(
            [(one.images, arm, one.run(arm, seed)) for one, seed in pairs for arm in one.arms]
        )
    results: Results = {}
    for one in chosen:
        draws = [
            [lines.find((one.images, arm, one.run(arm, seed))) for arm in one.arms]
            for seed in one.seeds
        ]
        complete = [draw for draw in draws if None not in draw]
        results[one.name] = {
            arm: [line for line in column if line is not None]
            for arm, column in zip(one.arms, zip(*complete, strict=True), strict=False)
        }
    return chosen, results
