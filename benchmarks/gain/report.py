"""Print results as tables, or convert them to JSON; verdicts are computed from intervals."""

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

CHANCE, CHANCE_TOLERANCE = 10.0, 2.0  # percent, for ten classes


def accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    """List the accuracies in percent."""
    return [outcome.accuracy for outcome in outcomes]


def checks(study: Study, arms: dict[str, list[Outcome]]) -> list[tuple[str, bool]]:
    """Check the required results of *study*; return a statement and whether it holds."""
    statements = []
    if study.chance:
        mean = statistics.fmean(accuracies(arms[study.chance]))
        statement = f"{study.chance}: {mean:.1f} %, must be {CHANCE:.0f} +- {CHANCE_TOLERANCE:.0f}"
        statements.append((statement, abs(mean - CHANCE) <= CHANCE_TOLERANCE))
    for arm, points in study.must.items():
        gain = paired(accuracies(arms[arm]), accuracies(arms[study.reference]))
        statement = f"{arm} over {study.reference}: {gain.mean:+.1f} points, must be at least {points:.0f}"
        statements.append((statement, gain.mean >= points))
    return statements


def format_difference(gain: Paired) -> str:
    """Format a paired difference."""
    return f"{gain.mean:+.2f} +- {gain.half:.2f}" if gain.n > 1 else f"{gain.mean:+.2f} (one seed)"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format mean and standard deviation of *values*."""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def arms_table(study: Study, arms: dict[str, list[Outcome]]) -> Table:
    """Build the table of the arms."""
    table = Table(title=f"{study.name}: {study.title}", title_justify="left", pad_edge=False)
    for heading in ("arm", "seeds", "correct %", "minus reference", "wins", "p", "CPU s", "verdict"):
        table.add_column(heading, overflow="fold")
    for arm, outcomes in arms.items():
        seconds = statistics.fmean(outcome.seconds for outcome in outcomes)
        cells = [arm, str(len(outcomes)), mean_and_deviation(accuracies(outcomes))]
        if study.reference and arm != study.reference:
            gain = paired(accuracies(outcomes), accuracies(arms[study.reference]))
            p = "" if math.isnan(gain.p) else f"{gain.p:.2g}"
            cells += [format_difference(gain), f"{gain.wins}/{gain.n}", p, f"{seconds:.1f}", gain.verdict]
        else:
            cells += ["reference" if study.reference else "", "", "", f"{seconds:.1f}", ""]
        table.add_row(*cells)
    return table


def print_studies(studies: Sequence[Study], results: Results, console: Console) -> None:
    """Print each study: its table, further comparisons and required results."""
    for study in studies:
        arms = results[study.name]
        console.print(arms_table(study, arms))
        for ours, other in study.pairs:
            gain = paired(accuracies(arms[ours]), accuracies(arms[other]))
            p = "" if math.isnan(gain.p) else f", p {gain.p:.2g}"
            statistic = f"{format_difference(gain)}, {gain.wins}/{gain.n} wins{p}"
            console.print(f"  {ours} minus {other}: {statistic}: {gain.verdict}")
        for statement, holds in checks(study, arms):
            console.print(f"  {'holds' if holds else 'FAILS'}: {statement}")
        console.print()


def results_of(study: Study, arms: dict[str, list[Outcome]]) -> list[Result]:
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
