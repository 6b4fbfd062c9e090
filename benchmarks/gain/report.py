"""Print studies as tables, or convert them to the results of all benchmarks."""

import argparse
import json
import math
import statistics
from collections.abc import Sequence

import numpy as np
from measure import Result, markdown, provenance, report

from gain.execution import Line, run_studies
from gain.paired import Paired, crossed
from gain.study import Study
from gain.train_and_measure import Outcome, decode_bits

HEAD = ("arm", "accuracy", "difference", "wins", "p", "CPU s")


def accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    """List the accuracies in percent."""
    return [outcome.accuracy for outcome in outcomes]


def compare(ours: Sequence[Outcome], other: Sequence[Outcome]) -> Paired:
    """Compute the paired difference; draws share test images, and the interval knows that."""
    return crossed(
        np.stack([answers(one) for one in ours]), np.stack([answers(one) for one in other])
    )


def answers(outcome: Outcome) -> np.ndarray:
    """Return 1 for each image of the pool that is right, 0 for a wrong one, NaN for others."""
    return np.where(decode_bits(outcome.tested), decode_bits(outcome.right), np.nan)


def difference_cells(gain: Paired) -> list[str]:
    """Format a paired difference: mean and interval, wins, p-value."""
    if gain.n == 1:
        return [f"{gain.mean:+.2f} (one seed)", f"{gain.wins}/1", ""]
    p = "" if math.isnan(gain.p) else f"{gain.p:.2g}"
    return [f"{gain.mean:+.2f} +- {gain.half:.2f}", f"{gain.wins}/{gain.n}", p]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format mean and standard deviation of *values*."""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(study: Study, arms: dict[str, list[Line]]) -> str:
    """Build the table of the arms, in which the reference is bold, and of further comparisons."""
    rows = []
    for arm, outcomes in arms.items():
        cells = ["", "", ""]
        if study.reference and arm != study.reference:
            cells = difference_cells(compare(outcomes, arms[study.reference]))
        seconds = statistics.fmean(outcome.seconds for outcome in outcomes)
        name = f"**{arm}**" if arm == study.reference else arm
        rows.append([name, mean_and_deviation(accuracies(outcomes)), *cells, f"{seconds:.1f}"])
    for ours, other in study.pairs:
        gain = compare(arms[ours], arms[other])
        rows.append([f"{ours} minus {other}", "", *difference_cells(gain), ""])
    return markdown(HEAD, rows)


def run_and_report(studies: Sequence[Study], given: argparse.Namespace) -> list[Study]:
    """Run *studies* as `run_studies` does, and print their tables, or JSON; return them with their rates."""
    chosen, results = run_studies(studies, given)
    if given.json:
        rows = [result for study in chosen for result in results_of(study, results[study.name])]
        report(rows, as_json=True)
        return chosen
    print(json.dumps(provenance()))
    for study in chosen:
        arms = results[study.name]
        draws = len(next(iter(arms.values()), ()))
        rates = {
            arm: one["learning_rate"]
            for arm, one in study.arms.items()
            if "learning_rate" in one
        }
        print(
            f"{study.name}: {study.title}, {draws} draws; rates {rates or study.template['learning_rate']}\n"
        )
        if draws:
            print(f"{table(study, arms)}\n")
    return chosen


def results_of(study: Study, arms: dict[str, list[Line]]) -> list[Result]:
    """Build the results of a study: accuracy of each arm in percent, compared with the reference arm."""
    means = {arm: statistics.fmean(accuracies(outcomes)) for arm, outcomes in arms.items()}
    return [
        Result(
            case=f"{study.name}: {arm}",
            against=study.reference if study.reference and arm != study.reference else "",
            ours=means[arm],
            other=means[study.reference]
            if study.reference and arm != study.reference
            else None,
            unit="% accuracy",
            runs=len(outcomes),
        )
        for arm, outcomes in arms.items()
    ]
