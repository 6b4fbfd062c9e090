"""`sopdeploy data check`: inspect a folder of images before training."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sopdeploy.cli.command import as_data, command
from sopdeploy.cli.console import print_json, print_table, say
from sopdeploy.errors import ConfigError, amount, shorten
from sopdeploy.photos.files import data_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sopdeploy.photos.check import DataReport, Duplicates
    from sopdeploy.report.wrong_labels import WrongLabel

_MAX_GROUPS = 10  # of equal images; --json lists all


def _show(report: "DataReport | list[WrongLabel]", *, as_json: bool) -> None:
    """Print the report, or the images whose labels are probably wrong; then raise the problems."""
    if as_json:
        print_json(as_data(report))
    elif isinstance(report, list):
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
    else:
        _print_report(report)

    if not isinstance(report, list):
        report.must_be_usable()


@command(
    _show,
    examples=(
        "sopdeploy data check photos/ --near",
        "sopdeploy data check photos/ --wrong-labels runs/latest",
    ),
)
def check(
    path: Path,
    *,
    near: bool = False,
    wrong_labels: Path | None = None,
    set: tuple[str, ...] = (),
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> "DataReport | list[WrongLabel]":
    """Decode every image and report sizes, formats, classes, duplicates and unreadable files.

    Exit code 2 means that a training run could not use the data. Duplicates do not change the
    exit code.

    Args:
        path: Folder with one subfolder per class.
        near: Also list near-duplicates, such as bursts.
        wrong_labels: Only list labels that are probably wrong, as a run on this folder predicts. If the run
            cannot tell, list the most doubtful labels (`is_suspect`).
        set: How the folder is read, as for `train`: data.classes_from=VALUE or data.leave_out=NAME,NAME;
            repeatable.
        on_image: Called with the numbers of images compared by a network, and in total.
    """
    if wrong_labels is None:
        from sopdeploy.photos.check import check_data

        reading = _read_settings(set)

        # Without torch or weights, only the pixels tell near-duplicates
        group_by_features = None
        if near and find_spec("torch") is not None:
            from sopdeploy.training.few_shot import default_network

            if default_network.has_default_weights():
                group_by_features = partial(default_network.group_images, on_image=on_image)
        return check_data(path, near=near, group_by_features=group_by_features, **reading)
    data_folder(path)  # before the import, which takes seconds
    from sopdeploy.report.wrong_labels import find_wrong_labels

    return list(find_wrong_labels(wrong_labels, path))


def _read_settings(settings: "Sequence[str]") -> dict[str, str]:
    """Return the *settings* `data.NAME=VALUE` that say how a folder is read; raises `ConfigError` for others."""
    import pydantic

    from sopdeploy.config import first_problem
    from sopdeploy.data.sources import FolderConfig
    from sopdeploy.training.recipe_files import parse_override

    names = ("classes_from", "leave_out")
    values = dict(map(parse_override, settings))
    if unknown := [key for key in values if key not in {f"data.{name}" for name in names}]:
        raise ConfigError(
            f"{unknown[0]}: not known here; set data.classes_from or data.leave_out",
            setting="set",
        )
    given = {key.removeprefix("data."): value for key, value in values.items()}
    try:
        config = FolderConfig.model_validate({"kind": "folder", **given})
    except pydantic.ValidationError as error:
        raise ConfigError(f"data.{first_problem(error, given)}", setting="set") from error
    return {name: getattr(config, name) for name in names}


def _print_report(report: "DataReport") -> None:
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
