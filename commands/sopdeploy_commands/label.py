"""`sopdeploy label`: move photos that Label Studio has labelled into the folders of their classes."""

import csv
import io
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from sopdeploy.base.files import MAX_NAMES_BYTES, advise_on, read_text, writing
from sopdeploy.base.names import class_problem
from sopdeploy.cli.command import command
from sopdeploy.cli.console import say
from sopdeploy.data.photos.files import is_hidden
from sopdeploy.data.photos.kept import NOT_OURS, kept_id
from sopdeploy.data.photos.spelling import normalize
from sopdeploy.errors import DataError, amount

# Columns of the export: the image of a task, and the choice, as the server's records name them
IMAGE = "image"
CLASS = "class"
UNKNOWN_SUFFIX = "-unknown"  # of the folder for photos that show none of the classes


class Labelled(NamedTuple):
    """How many photos moved to each folder, and how many labelled ones were not found."""

    moved: dict[str, int]
    missing: int


def _show(labelled: Labelled) -> None:
    for folder, count in labelled.moved.items():
        say(f"{folder}: {amount(count, 'photo')}")
    if labelled.missing:
        say(f"not found, perhaps because the server has deleted them: {labelled.missing:,}")


@command(_show, examples=("sopdeploy label project-1.csv kept --photos photos",))
def label(export: Path, kept: Path, *, photos: Path = Path("photos")) -> Labelled:
    """Move photos that you have labelled in Label Studio to PHOTOS/<class>/.

    Photos that show "not one of ours" move to PHOTOS-unknown/. Photos without a label stay in KEPT. If you
    correct labels and export again, the photos move to their new classes.

    Args:
        export: CSV file that Label Studio has exported.
        kept: Folder of the photos, which `serve --set keep=KEPT` has written.
        photos: Folder of the classes.

    Raises:
        DataError: The export cannot be read, or a label cannot be the name of a folder; nothing has moved then.
        StorageError: A photo cannot be moved.
    """
    labels = _read_labels(Path(export))
    unknown = Path(photos).with_name(f"{Path(photos).name}{UNKNOWN_SUFFIX}")

    # Where each photo is now, also one that an earlier export has moved.
    if not Path(kept).is_dir():
        raise DataError(
            f"{kept}: no such folder; give the folder in which the server keeps photos"
        )
    places = {
        path.name: path
        for folder in (unknown, Path(photos), Path(kept))
        for path in folder.rglob("*")
        if path.name in labels
    }

    moved: Counter[str] = Counter()
    for name, source in sorted(places.items()):
        folder = unknown if labels[name] == NOT_OURS else Path(photos) / labels[name]
        if source.parent.resolve() == folder.resolve():
            continue

        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(source, folder / name)
            source.with_suffix(".json").unlink(missing_ok=True)
        moved[str(folder)] += 1
    return Labelled(dict(sorted(moved.items())), len(labels) - len(places))


def _read_labels(export: Path) -> dict[str, str]:
    """Read the label of each kept photo by its name from the CSV file *export*; raises `DataError`."""
    try:
        rows = [*csv.DictReader(io.StringIO(read_text(export, MAX_NAMES_BYTES)), strict=True)]
    except OSError as error:
        raise DataError(f"{export}: {advise_on(error, 'give the CSV export')}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{export}: is not a CSV file ({error}); export the labels as CSV"
        ) from error
    if not rows or not {IMAGE, CLASS} <= {*rows[0]}:
        raise DataError(
            f"{export}: has no columns {IMAGE} and {CLASS} with labels; label photos, then export them as CSV"
        )

    labels: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        name = PurePosixPath(unquote(row[IMAGE] or "")).name
        label_of_row = normalize((row[CLASS] or "").strip())
        if not label_of_row or not kept_id(name):
            continue
        if problem := _folder_problem(label_of_row):
            raise DataError(f"{export}: line {number}: {label_of_row!r:.80} {problem}")
        labels[name] = label_of_row
    return labels


def _folder_problem(name: str) -> str:
    """Say why *name*, a label, cannot be the name of a class folder; "" if it can."""
    if name.startswith('{"choices"'):
        return "are several classes; train with --set data.classes_from=EXPORT instead"
    if class_problem(name) or "/" in name or is_hidden(name):
        return "cannot be the name of a class folder; choose another label"
    return ""
