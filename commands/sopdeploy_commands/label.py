"""`sopdeploy label`: move photos that Label Studio has labelled into the folders of their classes."""

import csv
import io
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from sopdeploy.base.files import MAX_NAMES_BYTES, advise_on, read_text, writing
from sopdeploy.base.names import class_problem
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text, say
from sopdeploy.data.photos.files import is_hidden, walk
from sopdeploy.data.photos.kept import NOT_OURS, SAMPLED, is_sampled, kept_id
from sopdeploy.data.photos.spelling import normalize
from sopdeploy.errors import DataError, amount, shorten

# Columns of the export: the image of a task, and the choice, as the server's records name them
IMAGE = "image"
CLASS = "class"
UNKNOWN_SUFFIX = "-unknown"  # of the folder for photos that show none of the classes
MAX_FOLDER_BYTES = 255  # of the name of a folder

# The name that a server gave a photo: as the name of a file, in a path or in an address
_PHOTO = re.compile(rf"(?:^|[/\\=])([0-9a-f]{{32}}(?:{SAMPLED})?\.(?:jpg|png))(?:$|[?&#])")


class Labelled(NamedTuple):
    """What happened to the photos of an export with *rows*.

    *moved* counts photos by their new folder. *conflicts* has the labels of each photo that has several,
    by its name, and *not_ours* images that no server has kept. Rows without a label are *unlabelled*.
    Photos of the other rows were *in_place* already, or *missing*.
    """

    rows: int
    moved: dict[str, int]
    conflicts: dict[str, list[str]]
    not_ours: tuple[str, ...]
    unlabelled: int
    in_place: int
    missing: int


def _show(labelled: Labelled) -> int:
    """Print what moved, and each doubt; the exit code is 1 if nothing has moved."""
    for folder, count in labelled.moved.items():
        say(f"{folder}: {amount(count, 'photo')}")

    if labelled.conflicts:
        names = shorten(
            [f"{name} ({' or '.join(labels)})" for name, labels in labelled.conflicts.items()]
        )
        err.print(plain_text(f"warning: rows disagree, so these photos stay: {names}"))
    if labelled.not_ours:
        names = shorten(labelled.not_ours)
        advice = "import the folder of the server as local files instead of uploading images"
        err.print(plain_text(f"warning: no server kept these images: {names}; {advice}"))
    if labelled.missing:
        say(f"not found, perhaps because the server has deleted them: {labelled.missing:,}")
    if not labelled.moved:
        say("nothing has moved")

    num_moved = sum(labelled.moved.values())
    more = {"in place already": labelled.in_place, "without a label": labelled.unlabelled}
    say(
        f"rows: {labelled.rows:,}, moved: {num_moved:,}, conflicts: {len(labelled.conflicts):,}, "
        f"not ours: {len(labelled.not_ours):,}"
        + "".join(f", {name}: {count:,}" for name, count in more.items() if count)
    )
    return 0 if labelled.moved else 1


@command(_show, examples=("sopdeploy label project-1.csv kept --photos photos",))
def label(export: Path, kept: Path, *, photos: Path = Path("photos")) -> Labelled:
    """Move photos that you have labelled in Label Studio to PHOTOS/<class>/.

    Photos that show "not one of ours" move to PHOTOS-unknown/. Photos without a label stay in KEPT, and
    photos with different labels stay where they are. If you correct labels and export again, the photos
    move to their new classes. The exit code is 1 if nothing has moved.

    Args:
        export: CSV file that Label Studio has exported.
        kept: Folder of the photos, which `serve --set keep=KEPT` has written.
        photos: Folder of the classes.

    Raises:
        DataError: The export cannot be read, or a label cannot be the name of a folder; nothing has moved then.
        StorageError: A photo cannot be moved.
    """
    rows = _read_rows(Path(export))
    photos = Path(photos)
    if photos.name in {"", ".."}:
        photos = photos.resolve()
    unknown = photos.parent / f"{photos.name}{UNKNOWN_SUFFIX}"
    if not Path(kept).is_dir():
        raise DataError(
            f"{kept}: no such folder; give the folder in which the server keeps photos"
        )

    places = _find_photos([unknown, photos, Path(kept)])
    moved: Counter[str] = Counter()
    conflicts: dict[str, list[str]] = {}
    in_place = missing = 0
    for identity, labels in sorted(rows.labels.items()):
        found = places[identity]
        if len(labels) > 1:
            conflicts[found[0].name if found else identity] = sorted(labels)
            continue
        if not found:
            missing += 1
            continue

        [text] = labels
        folder = unknown if text == NOT_OURS else photos / text
        if len(found) == 1 and folder.resolve() in found[0].parents:
            in_place += 1
            continue
        _move(found, folder)
        moved[str(folder)] += 1
    return Labelled(
        rows=rows.total,
        moved=dict(sorted(moved.items())),
        conflicts=conflicts,
        not_ours=rows.not_ours,
        unlabelled=rows.unlabelled,
        in_place=in_place,
        missing=missing,
    )


def _find_photos(folders: list[Path]) -> dict[str, list[Path]]:
    """Find the places of each kept photo in *folders*, which may overlap, by its ID; raises `DataError`."""
    places: dict[str, list[Path]] = defaultdict(list)
    for folder in filter(Path.is_dir, folders):
        for path in walk(folder):
            if _PHOTO.search(path.name) and not path.is_symlink():
                found = places[kept_id(path.name)]
                if path.resolve() not in found:
                    found.append(path.resolve())
    return places


def _move(found: list[Path], folder: Path) -> None:
    """Move a photo, which is at the places *found*, to *folder*, and delete its copies.

    What is below *folder* already remains there. The photo stays in the random sample if one of its
    copies is. Raises `StorageError`.
    """
    name = max((path.name for path in found), key=is_sampled)
    target = folder.resolve()
    one, *others = sorted(found, key=lambda path: target not in path.parents)
    place = one.parent if target in one.parents else target

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in others:
            path.unlink(missing_ok=True)
        shutil.move(one, place / name)
        for path in found:
            if target not in path.parents:
                path.with_suffix(".json").unlink(missing_ok=True)


class _Rows(NamedTuple):
    """How many rows an export has in *total*, the labels of each photo by its ID, and the rows of neither."""

    total: int
    labels: dict[str, set[str]]
    not_ours: tuple[str, ...]
    unlabelled: int


def _read_rows(export: Path) -> _Rows:
    """Read the labels of kept photos from the CSV file *export*; raises `DataError`."""
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

    labels: dict[str, set[str]] = defaultdict(set)
    not_ours: list[str] = []
    unlabelled = 0
    for number, row in enumerate(rows, 2):
        image = unquote(row[IMAGE] or "")
        photo = _PHOTO.search(image)
        text = normalize((row[CLASS] or "").strip())
        if photo is None:
            not_ours.append(image.rpartition("/")[2])
        elif not text:
            unlabelled += 1
        elif problem := _folder_problem(text):
            raise DataError(f"{export}: line {number}: {text!r:.80} {problem}")
        else:
            labels[kept_id(photo[1])].add(text)
    return _Rows(len(rows), labels, tuple(not_ours), unlabelled)


def _folder_problem(name: str) -> str:
    """Say why *name*, a label, cannot be the name of a class folder; "" if it can."""
    if name.startswith('{"choices"'):
        return "are several classes; train with --set data.classes_from=EXPORT instead"
    is_long = len(name.encode()) > MAX_FOLDER_BYTES
    if class_problem(name) or is_long or "/" in name or is_hidden(name):
        return "cannot be the name of a class folder; choose another label"
    return ""
