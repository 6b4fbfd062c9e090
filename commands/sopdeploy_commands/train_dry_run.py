"""`sopdeploy train --dry-run`: what a training run would read, without training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from sopdeploy.base.config import first_problem
from sopdeploy.cli.console import print_table, say
from sopdeploy.errors import ConfigError, amount, shorten
from sopdeploy.training.settings.recipe_files import parse_override

if TYPE_CHECKING:
    from sopdeploy.data.folders.check import DataReport, Duplicates
    from sopdeploy.report.wrong_labels import WrongLabel

_MAX_GROUPS = 10  # of equal images; --json lists all


def check_images(
    data: Path | None,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
    on_image: Callable[[int, int], None],
) -> "DataReport":
    """Decode every image of the folder *data* that a training run would read, and report what it holds.

    *overrides* come from `--set`, and *settings* from Python; only `data.classes_from` and
    `data.leave_out` count. *on_image* is called with the numbers of images compared by a network, and in
    total. Raises `ConfigError` for an invalid setting, and `DataError` if the images cannot be used.
    """
    from sopdeploy.data.folders.check import check_data
    from sopdeploy.data.sources import FolderConfig  # imports numpy

    if data is None:
        raise ConfigError(
            "give the folder of the images", setting="dry_run", remedies={"data": None}
        )
    given = {
        name: value
        for key, value in [*map(parse_override, overrides), *settings.items()]
        for name in ("classes_from", "leave_out")
        if key == f"data.{name}"
    }
    try:
        config = FolderConfig.model_validate({"kind": "folder", **given})
    except pydantic.ValidationError as error:
        raise ConfigError(f"data.{first_problem(error, given)}", setting="set") from error

    # Without torch or weights, only identical files are found.
    group_by_features = None
    if find_spec("torch") is not None:
        from sopdeploy.training.few_shot import default_network

        if default_network.has_default_weights():
            group_by_features = partial(default_network.group_images, on_image=on_image)
    return check_data(
        data,
        near=True,
        group_by_features=group_by_features,
        classes_from=config.classes_from,
        leave_out=config.leave_out,
    )


def print_wrong_labels(report: "Sequence[WrongLabel]") -> None:
    """Print a table of the images of *report*, whose labels are probably wrong."""
    from sopdeploy.html.report import percent

    rows = []
    for wrong in report:
        shares = percent(wrong.probability), percent(wrong.probability_suggested)
        rows.append((wrong.file, wrong.label, shares[0], wrong.suggested, shares[1]))
    print_table(("file", "label", "probability", "suggested", "probability"), rows)
    if any(wrong.is_suspect for wrong in report):
        say(
            "the classifier disagrees with too many labels to tell which ones are wrong; the table has "
            "the labels that it contradicts most"
        )


def print_report(report: "DataReport") -> None:
    """Print a table of the parts, and lines about the images."""
    from sopdeploy.images.signatures import describe_skipped

    # Each part with its classes, of which the rarest are listed first.
    rows = []
    lines = []
    for part in report.parts:
        counts = sorted(part.classes.values()) or [0]
        numbers = len(part.classes), counts[0], counts[-1]
        rows.append((part.name, str(part.count), f"{part.bytes / 1e6:.1f}", *map(str, numbers)))
        rarest_first = sorted(part.classes.items(), key=lambda pair: pair[1])
        listed = shorten([f"{label} {count}" for label, count in rarest_first])
        lines.append(f"{part.name}, rarest classes first: {listed}")

    print_table(("part", "images", "MB", "classes", "fewest", "most"), rows)

    # What decoding has shown: formats, sizes of images, and photographs that are there twice.
    if report.formats:  # empty if no image was decoded
        lines.append(
            "formats: " + ", ".join(f"{name} {count}" for name, count in report.formats.items())
        )
        for name, (low, median, high) in (
            ("shorter", report.shorter_side),
            ("longer", report.longer_side),
        ):
            lines.append(f"{name} side: {low} to {high} pixels, median {median}")
        lines += _duplicate_lines("duplicates", "equal pixels", report.duplicates)
        if report.near is not None:
            lines += _duplicate_lines("near-duplicates", "by a network", report.near)

    # What was not counted, and what the user should know.
    if report.passed_over:
        lines.append(describe_skipped(report.passed_over))
    lines += [*report.notes, *report.classes]  # `classes` are problems of class folders
    if report.unreadable:
        lines.append(f"{len(report.unreadable)} cannot be read")
    elif report.formats:
        lines.append("every image can be read")
    say(*lines)


def _duplicate_lines(name: str, content: str, groups: "Sequence[Duplicates]") -> list[str]:
    """Summarize the *groups* of images with equal *content*; list `_MAX_GROUPS`, the most harmful ones first."""
    if not groups:
        return [f"{name}: none"]

    across = sum(group.across for group in groups)
    differ = sum(group.labels_differ for group in groups)
    summary = (
        f"{name}: {amount(len(groups), 'group')} with {content}, {across} in both "
        f"training and validation data, {differ} in different classes"
    )

    worst_first = sorted(groups, key=lambda group: (not group.across, not group.labels_differ))
    return [summary, *(" = ".join(group.files) for group in worst_first[:_MAX_GROUPS])]
