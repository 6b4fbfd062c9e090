"""Results as tables and as JSON; every verdict is computed from an interval."""

import math
import statistics
from collections.abc import Sequence

from measure import Result
from rich.console import Console
from rich.table import Table

from gain.paired import Paired, paired
from gain.run import Outcome
from gain.runs import Results
from gain.study import Study

CHANCE, CHANCE_SLACK = 10.0, 2.0  # percent, of ten classes


def accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the accuracies in percent."""
    return [outcome.accuracy for outcome in outcomes]


def compared(study: Study, arms: dict[str, list[Outcome]]) -> list[tuple[str, str, Paired]]:
    """Return every comparison of *study*: each arm with the reference, then the further pairs."""
    wanted = [(arm, study.reference) for arm in study.arms if study.reference and arm != study.reference]
    return [
        (ours, other, paired(accuracies(arms[ours]), accuracies(arms[other])))
        for ours, other in [*wanted, *study.pairs]
    ]


def checks(study: Study, arms: dict[str, list[Outcome]]) -> list[tuple[str, bool]]:
    """Return what must hold of *study*, and whether it does."""
    found = []
    if study.chance:
        mean = statistics.fmean(accuracies(arms[study.chance]))
        said = f"{study.chance}: {mean:.1f} %, must be {CHANCE:.0f} +- {CHANCE_SLACK:.0f}"
        found.append((said, abs(mean - CHANCE) <= CHANCE_SLACK))
    for arm, points in study.must.items():
        gain = paired(accuracies(arms[arm]), accuracies(arms[study.reference]))
        said = f"{arm} over {study.reference}: {gain.mean:+.1f} points, must be at least {points:.0f}"
        found.append((said, gain.mean >= points))
    return found


def difference(gain: Paired) -> str:
    """Return a paired difference in words."""
    return f"{gain.mean:+.2f} +- {gain.half:.2f}" if gain.n > 1 else f"{gain.mean:+.2f} (one seed)"


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation of *values*."""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(study: Study, arms: dict[str, list[Outcome]]) -> Table:
    """Return the table of the arms."""
    drawn = Table(title=f"{study.name}: {study.title}", title_justify="left", pad_edge=False)
    for heading in ("arm", "seeds", "correct %", "minus reference", "wins", "p", "CPU s", "verdict"):
        drawn.add_column(heading, overflow="fold")
    if any(outcome.experts is not None for outcomes in arms.values() for outcome in outcomes):
        drawn.add_column("experts used")
    for arm, outcomes in arms.items():
        seconds = statistics.fmean(outcome.seconds for outcome in outcomes)
        cells = [arm, str(len(outcomes)), spread(accuracies(outcomes))]
        if study.reference and arm != study.reference:
            gain = paired(accuracies(outcomes), accuracies(arms[study.reference]))
            p = "" if math.isnan(gain.p) else f"{gain.p:.2g}"
            cells += [difference(gain), f"{gain.wins}/{gain.n}", p, f"{seconds:.1f}", gain.verdict]
        else:
            cells += ["reference" if study.reference else "", "", "", f"{seconds:.1f}", ""]
        used = [outcome.experts for outcome in outcomes if outcome.experts is not None]
        if len(drawn.columns) > len(cells):
            cells.append(f"{statistics.fmean(used):.1f}" if used else "")
        drawn.add_row(*cells)
    return drawn


def show(studies: Sequence[Study], results: Results, console: Console) -> None:
    """Print every study: its table, its further comparisons, what must hold of it."""
    for study in studies:
        arms = results[study.name]
        console.print(table(study, arms))
        for ours, other in study.pairs:
            gain = paired(accuracies(arms[ours]), accuracies(arms[other]))
            p = "" if math.isnan(gain.p) else f", p {gain.p:.2g}"
            console.print(
                f"  {ours} minus {other}: {difference(gain)}, {gain.wins}/{gain.n} wins{p}: {gain.verdict}"
            )
        for said, holds in checks(study, arms):
            console.print(f"  {'holds' if holds else 'FAILS'}: {said}")
        console.print()


def measured(study: Study, arms: dict[str, list[Outcome]]) -> list[Result]:
    """Build the results of a study: accuracy of each arm in percent, compared with the reference arm."""
    means = {arm: statistics.fmean(accuracies(outcomes)) for arm, outcomes in arms.items()}
    return [
        Result(
            case=f"{study.name}: {arm}",
            against=study.reference if study.reference and arm != study.reference else "",
            ours=means[arm],
            other=means[study.reference] if study.reference and arm != study.reference else None,
            unit="% accuracy",
            runs=len(outcomes),
        )
        for arm, outcomes in arms.items()
    ]
