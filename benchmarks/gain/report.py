"""The tables of the experiment, as Markdown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from measure import markdown

from gain.arms import ARMS, AVERAGES, DEFAULT, THREE_MAPS, TWICE
from gain.first_order import FIRST_ORDER
from gain.frozen import FROZEN
from gain.moment_probing import PROBES
from gain.runs import Answers, Line, Lines, describe_gain, mean_accuracy


def build_tables(lines: Lines, names: Sequence[str], side: int) -> list[str]:
    """Build the tables of the finished runs on the sets *names* with images of *side* pixels.

    Each has another head, so that a file that has it can be brought up to date (`update_file`).
    """
    tables = []
    for name in names:
        for few in (False, True):
            rows = _frozen_rows(lines, name, side, few=few)
            images = "ten training images per class" if few else "all training images"
            head = f"{name}, frozen, {images}, {side} pixels"
            columns = (head, "accuracy, %", "over averages", "over three maps")
            tables.append(markdown(columns, rows) if rows else "")

        rows = _first_order_rows(lines, name, side)
        columns = (f"{name}, first order, {side} pixels", "accuracy, %", "the default gains")
        tables.append(markdown(columns, rows) if rows else "")

    rows = _rate_rows(lines, names[0], side)
    columns = (f"{names[0]}, first half of the classes", "accuracy, % (rate)", "chosen rate")
    tables.append(markdown(columns, rows) if rows else "")

    for position, name in enumerate(names):
        rows = _tuned_rows(lines, name, side)
        chosen_on = "other classes" if position == 0 else names[0]
        columns = (
            f"{name}, fine-tuned (rates chosen on {chosen_on}), {side} pixels",
            "closed form, %",
            "fine-tuned, %",
            "over averages",
            f"over {TWICE}",
            "over its control",
            "over its closed form",
            "CPU s an epoch",
        )
        tables.append(markdown(columns, rows) if rows else "")

        rows = _probe_rows(lines, name, side)
        columns = (
            f"{name}, trained on frozen features, {side} pixels",
            "accuracy, %",
            f"over the closed form of {AVERAGES}",
            f"over the closed form of {DEFAULT}",
            "CPU s",
        )
        tables.append(markdown(columns, rows) if rows else "")
    return [table for table in tables if table]


def update_file(path: Path, tables: Sequence[str]) -> None:
    """Replace the tables of the text file *path* that have the head of one of *tables*."""
    text = path.read_text(encoding="utf-8")
    for table in tables:
        rows = table.strip("\n") + "\n"
        head = re.escape(rows.partition("\n")[0])
        text = re.sub(rf"^{head}\n(?:\|.*\n)*", lambda _, rows=rows: rows, text, flags=re.M)
    path.write_text(text, encoding="utf-8")


def _answers(lines: Sequence[Line], *, frozen: bool = False) -> Answers:
    return {line.seed: line.answers(frozen=frozen) for line in lines}


def _frozen_rows(lines: Lines, name: str, side: int, *, few: bool) -> list[list[str]]:
    """Build the rows of all arms on *name*, with all training images or with *few*."""
    by_arm = {
        arm: _answers(
            [
                line
                for line in lines.select("frozen", name, arm, side)
                if bool(line.per_class) == few
            ]
        )
        for arm in FROZEN
    }
    return [
        [
            arm,
            f"{mean_accuracy(list(ours.values())):.1f}",
            "" if arm == AVERAGES else describe_gain(ours, by_arm[AVERAGES]),
            "" if arm in (AVERAGES, THREE_MAPS) else describe_gain(ours, by_arm[THREE_MAPS]),
        ]
        for arm, ours in by_arm.items()
        if ours
    ]


def _first_order_rows(lines: Lines, name: str, side: int) -> list[list[str]]:
    """Build the rows of the best classifiers of first-order statistics on *name*."""
    default = {
        line.seed: line.answers()
        for line in lines.select("frozen", name, DEFAULT, side)
        if not line.per_class
    }
    rows = []
    for arm in FIRST_ORDER:
        runs = lines.select("first order", name, arm, side)
        if runs:
            ours = _answers(runs)
            accuracy = f"{mean_accuracy(list(ours.values())):.1f}"
            rows.append([arm, accuracy, describe_gain(default, ours)])
    return rows


def _rate_rows(lines: Lines, name: str, side: int) -> list[list[str]]:
    """Build the rows of the accuracy of each rate."""
    rows = []
    for arm in ARMS:
        runs = lines.select("rates", name, arm, side)
        if runs:
            cells = [f"{line.accuracy:.1f} ({line.rate:g})" for line in runs]
            best = max(runs, key=lambda line: line.accuracy)
            rows.append([arm, ", ".join(cells), f"{best.rate:g}"])
    return rows


def _tuned_rows(lines: Lines, name: str, side: int) -> list[list[str]]:
    """Build the rows of all fine-tuned arms on *name*."""
    runs: Mapping[str, list[Line]] = {
        arm: lines.select("tuned", name, arm, side) for arm in ARMS
    }
    averages = _answers(runs[AVERAGES])
    for_longer = _answers(runs[TWICE])  # no other arm trains for more CPU seconds
    rows = []
    for arm, of_arm in runs.items():
        if not of_arm:
            continue
        ours = _answers(of_arm)
        frozen = _answers(of_arm, frozen=True)
        over_controls = [
            describe_gain(ours, _answers(runs[control])) for control in ARMS[arm].controls
        ]
        per_epoch = fmean(line.seconds / (len(line.losses) - 1) for line in of_arm)
        rows.append(
            [
                f"{arm} ({len(of_arm)})",
                f"{mean_accuracy(list(frozen.values())):.1f}",
                f"{mean_accuracy(list(ours.values())):.1f}",
                "" if arm == AVERAGES else describe_gain(ours, averages),
                "" if arm in (AVERAGES, TWICE) else describe_gain(ours, for_longer),
                "; ".join(gain for gain in over_controls if gain),
                describe_gain(ours, frozen),
                f"{per_epoch:.0f}",
            ]
        )
    return rows


def _probe_rows(lines: Lines, name: str, side: int) -> list[list[str]]:
    """Build the rows of the probes on *name*, beside the closed forms from which the fine-tuned arms start."""
    averages = _answers(lines.select("tuned", name, AVERAGES, side), frozen=True)
    default = _answers(lines.select("tuned", name, DEFAULT, side), frozen=True)
    rows = []
    for probe in PROBES:
        runs = lines.select("probes", name, probe, side)
        if runs:
            ours = _answers(runs)
            accuracy = f"{mean_accuracy(list(ours.values())):.1f}"
            seconds = f"{fmean(line.seconds for line in runs):.0f}"
            row = [
                f"{probe} ({len(runs)})",
                accuracy,
                describe_gain(ours, averages),
                describe_gain(ours, default),
            ]
            rows.append([*row, seconds])
    return rows
