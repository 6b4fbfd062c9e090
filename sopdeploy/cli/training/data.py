"""`sopdeploy data check`: inspect a folder of images before training."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.app import SETTINGS
from sopdeploy.cli.console import JsonOption, one_line_errors, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sopdeploy.data.check import DataReport, Duplicates

_MAX_GROUPS = 10  # of equal images; --json lists all

data_command = typer.Typer(name="data", add_completion=False, **SETTINGS)


@data_command.callback()
def _inspect_images() -> None:
    """Inspect images before training.

    Example: sopdeploy data check photos/
    """


@data_command.command("check")
def _check(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with one subfolder per class.")],
    near: Annotated[bool, typer.Option("--near", help="Also list near-duplicates, such as bursts.")] = False,
    wrong_labels: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Only list labels that are probably wrong, by this run of DIR."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every image and report sizes, formats, classes, duplicates and unreadable files.

    Exit code 2 means that a training run could not use the data. Duplicates do not change the exit code.

    Example: sopdeploy data check photos/ --near

    Example: sopdeploy data check photos/ --wrong-labels runs/latest
    """
    if wrong_labels is not None:
        with one_line_errors(as_json):
            _print_labels(path, wrong_labels, as_json=as_json)
        return
    with one_line_errors(as_json):
        from sopdeploy.data.check import check_data

        report = check_data(path, near=near)
        if as_json:
            print_json(report.model_dump(mode="json"))
        else:
            _print_report(report)
    with one_line_errors():  # without as_json: the report was printed, and stdout holds one JSON document
        report.must_be_usable()


def _print_labels(path: Path, run: Path, *, as_json: bool) -> None:
    """Print the images of *path* whose labels are probably wrong, as a table or JSON."""
    from sopdeploy.html.report import percent
    from sopdeploy.report.wrong_labels import find_wrong_labels

    found = find_wrong_labels(run, path)
    if as_json:
        print_json([wrong.model_dump(mode="json") for wrong in found])
    else:
        rows = []
        for one in found:
            shares = map(percent, (one.probability, one.probability_suggested))
            rows.append(
                (os.path.relpath(one.file, path), one.label, next(shares), one.suggested, next(shares))
            )
        print_table(("file", "label", "probability", "suggested", "probability"), rows)


def _print_report(report: "DataReport") -> None:
    from sopdeploy.data.datasets.folder import describe_skipped
    from sopdeploy.errors import shorten

    rows, lines = [], []
    for part in report.parts:
        rarest_first = sorted(part.classes.items(), key=lambda pair: pair[1])
        counts = [count for _, count in rarest_first] or [0]
        sizes = map(str, (len(rarest_first), counts[0], counts[-1]))
        rows.append((part.name, str(part.count), f"{part.bytes / 1e6:.1f}", *sizes))
        classes = shorten([f"{label} {count}" for label, count in rarest_first])
        lines.append(f"{part.name}, rarest classes first: {classes}")
    print_table(("part", "images", "MB", "classes", "fewest", "most"), rows)
    if report.formats:
        lines.append("formats: " + ", ".join(f"{name} {count}" for name, count in report.formats.items()))
        for name, (low, median, high) in (("shorter", report.shorter_side), ("longer", report.longer_side)):
            lines.append(f"{name} side: {low} to {high} pixels, median {median}")
        lines += _duplicate_lines("duplicates", "equal pixels", report.duplicates)
        if report.near is not None:
            lines += _duplicate_lines("near-duplicates", "copies of one photograph", report.near)
    for reason, files in report.strange.items():
        lines.append(f"{len(files)} image{'s' * (len(files) > 1)}: {reason}: {shorten(files)}")
    if report.passed_over:
        lines.append(describe_skipped(report.passed_over))
    lines += [*report.notes, *report.classes]
    if report.unreadable:
        lines.append(f"{len(report.unreadable)} cannot be read")
    elif report.formats:
        lines.append("every image can be read")
    say(*lines)


def _duplicate_lines(name: str, content: str, groups: "Sequence[Duplicates]") -> list[str]:
    """Summarize the *groups* of images and list them, the most harmful ones first."""
    if not groups:
        return [f"{name}: none"]
    across, differ = sum(group.across for group in groups), sum(group.labels_differ for group in groups)
    summary = (
        f"{name}: {len(groups)} group{'s' * (len(groups) > 1)} with {content}, {across} in both "
        f"training and held-out data, {differ} in different classes"
    )
    worst_first = sorted(groups, key=lambda group: (not group.across, not group.labels_differ))
    return [summary, *(" = ".join(group.files) for group in worst_first[:_MAX_GROUPS])]
