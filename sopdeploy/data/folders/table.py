"""Images with one or any number of classes each, listed in `labels.csv` of their folder.

    file,classes,split
    images/1.jpg,cat|dog,train
    images/2.jpg,,val

`classes` are separated by `|` or `;` and may be empty. If every image has exactly one class,
the targets are class indices, as for class folders. `split` is optional, as is `group`: images
with the same one, such as a burst or photographs of one object, are never divided. Paths are
relative to the folder and cannot leave it; the name of one image in any subfolder, also without
its suffix, with another folder or in an address, is enough. Instead of `classes`, each class may
have a column with 1 and 0. Beside `file` and `classes`, other columns are left out, and two
columns need no heading.

`layout` says which table is read.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.project import AS_IT_IS, FolderReading
from sopdeploy.data.folders.cells import GROUP, SEPARATOR, SPLIT, read_cells
from sopdeploy.data.photos.files import list_images
from sopdeploy.data.photos.listed_images import ListedImages
from sopdeploy.data.photos.parts import TRAIN, VAL
from sopdeploy.data.photos.photo import ImageFiles, can_leave_out
from sopdeploy.data.photos.spelling import (
    check_labels,
    describe_confusable,
    hint_at_spelling,
    normalize,
)
from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import count_suffixes

# of classes in a cell
SEPARATORS = re.compile(r"[|;]")
UNSPLIT = "all"  # the name of the only part if the images are not split


class OpenedParts(NamedTuple):
    """The images of a data set by part, the training images first.

    Attributes:
        problems: Why a network cannot be trained on them.
        notes: What the user may not have intended.
        ignored: Number of files that are not images, by suffix.
        reading: How the folder was read.
        commands: Commands that train without what is wrong.
    """

    parts: dict[str, ImageFiles]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    ignored: Mapping[str, int] = {}
    reading: FolderReading = AS_IT_IS
    commands: Sequence[str] = ()


def read_label_table(
    table: Path,
    labels: tuple[str, ...] | None = None,
    *,
    multi_label: bool | None = None,
    root: Path | None = None,
    column: str = "",
) -> OpenedParts:
    """Read *table*, whose classes must be among *labels*; by default, these are its classes, sorted.

    It lists images in *root*, by default its folder. *column* is the heading above the classes, if it is not a
    usual one.

    The parts are `train` and `val`, or `UNSPLIT` without a column `split`. Their targets are
    (N, C) float32, 1 for the classes of an image, or class indices (N,). *multi_label* is by
    default true if an image does not have exactly one class. Raises `DataError` for the first
    invalid row, by its place in the table, for many missing files, for fewer than two classes, and
    for other classes than *labels*.
    """
    root = table.parent if root is None else root
    image_paths, other_files = list_images(root)
    notes: list[str] = []
    all_rows = read_rows(table, image_paths, root, notes, column)

    # Label tools list all images, also those that nobody has labelled.
    rows = [row for row in all_rows if row.classes is not None]
    if unlabelled := [row.file for row in all_rows if row.classes is None]:
        files = f"{amount(len(unlabelled), 'image')}: {shorten(unlabelled)}"
        notes.append(f"{table}: left out, because they have no class there: {files}")

    # The classes, which a network may prescribe.
    listed = {label for row in rows for label in row.classes or ()}
    labels = tuple(sorted(listed)) if labels is None else labels
    # A network that is trained needs two classes, one that is evaluated has them already.
    _check_classes(table, labels, listed, least=2 if multi_label is None else 1)

    # The images with targets and groups, divided if there is a column `split`.
    targets = _build_targets(table, rows, labels, multi_label)
    paths = np.asarray([row.path for row in rows], dtype=np.bytes_)
    groups = None
    if any(row.group for row in rows):  # an image without one is a group of its own
        groups = np.asarray(
            [f"group {row.group}" if row.group else f"file {row.file}" for row in rows]
        )
    images = ImageFiles(root, labels, paths, targets, groups)
    parts = {UNSPLIT: images}
    if rows[0].part is not None:
        is_training_N = np.asarray([row.part == TRAIN for row in rows])
        parts = {TRAIN: images.select(is_training_N), VAL: images.select(~is_training_N)}

    notes += [f"{table}: {line}" for line in describe_confusable(listed)]
    if unlisted := sorted({*image_paths} - {row.path for row in all_rows}):
        notes.append(_note_unlisted(table, root, unlisted))

    ignored = count_suffixes(file for file in other_files if file != table.name)
    return OpenedParts(parts, notes=notes, ignored=ignored)


def _check_classes(table: Path, labels: tuple[str, ...], listed: set[str], least: int) -> None:
    """Raise `DataError` unless *labels* are *least* usable classes or more, and have all that are *listed*."""
    check_labels(table, labels)
    if len(labels) < least:
        names = shorten(labels) or "none"
        raise DataError(
            f"{table}: has fewer than two classes ({names}); a network needs at least two"
        )
    if unknown := sorted(listed - set(map(normalize, labels))):
        hint = hint_at_spelling(unknown, labels)
        raise DataError(
            f"{table}: {shorten(unknown)} are not classes of the network; remove them{hint}"
        )


def _note_unlisted(table: Path, root: Path, unlisted: Sequence[bytes]) -> str:
    """Say which images in *root* are *unlisted* in *table*, and so left out."""
    files = shorten([str(root / os.fsdecode(path)) for path in unlisted])
    return f"not listed in {table.name}: {amount(len(unlisted), 'image')}: {files}"


def check_has_classes(table: Path, name: str, images: ImageFiles) -> None:
    """Raise `DataError` if no image of *name*, a part of the divided *table*, has a class."""
    if name != UNSPLIT and not images.class_counts().any():
        raise DataError(f"{table}: no image of split {name} has a class; add some")


def _build_targets(
    table: Path, rows: list["_Row"], labels: tuple[str, ...], multi_label: bool | None
) -> NDArray[Any]:
    """Build the targets of *rows*: (N, C) float32 with several classes per image, else (N,).

    *multi_label* says which; with None, there are several classes unless each row has one.
    Raises `DataError` if a row must have one and has not.
    """
    names = [normalize(label) for label in labels]
    targets = np.array(
        [[name in (row.classes or ()) for name in names] for row in rows], dtype=np.float32
    )
    not_single = np.flatnonzero(targets.sum(axis=1) != 1)  # indices of rows
    is_multi_label = not_single.size > 0 if multi_label is None else multi_label
    if is_multi_label:
        return targets
    if not_single.size > 0:
        place = rows[not_single[0]].place
        raise DataError(
            f"{table}: {place}: has no class or several classes, but the network predicts "
            "one; keep one class"
        )
    return targets.argmax(axis=1)


class _Row(NamedTuple):
    """An image of a table.

    The place is "line 3" or "image 3" (`read_cells`). The classes are None if nobody has
    labelled the image in a label tool, the part is None without a column `split`, and the path
    until the file is found.
    """

    place: str
    file: str
    classes: set[str] | None
    part: str | None
    group: str
    path: bytes | None


def read_rows(
    table: Path,
    image_paths: list[bytes],
    root: Path,
    notes: list[str] | None = None,
    column: str = "",
) -> list[_Row]:
    """Read the rows of *table*; *image_paths* are the images in *root*. Raises `DataError`.

    *notes* gets lines about the columns and the missing images that are left out.
    """
    images = ListedImages(root, image_paths)
    notes = [] if notes is None else notes
    rows: dict[bytes | str, _Row] = {}
    for place, cells in read_cells(table, notes, images, column):
        where = f"{table}: {place}"
        file, path = images.find(cells["file"], where)

        # Its classes and its part.
        listed = cells.get("classes")
        classes = None if listed is None else set[str]()
        if listed:
            classes = {normalize(label.strip()) for label in SEPARATORS.split(listed)}
        if classes and "" in classes:
            raise DataError(
                f"{where}: {listed!r} has an empty class name; separate classes by "
                f"one {SEPARATOR}"
            )

        part = cells.get(SPLIT)  # None without this column
        if part not in (TRAIN, VAL, None):
            raise DataError(f"{where}: split is {part!r}; write {TRAIN} or {VAL}")

        # A row for each file; two rows for one file are an error.
        row = _Row(place, str(file), classes, part, cells.get(GROUP, ""), path)
        first = rows.setdefault(path or str(file), row)
        # An image with several boxes of one class has a row for each.
        is_repeated = (first.classes, first.part, first.group) == (classes, part, row.group)
        if first is not row and not is_repeated:
            raise DataError(
                f"{where}: {file} is also the file of {first.place}; list each file once"
            )
    if not rows:
        raise DataError(f"{table}: lists no images; add some")

    # Nearly all files must exist.
    missing = [row for row in rows.values() if row.path is None]
    if not can_leave_out(len(missing), len(rows)):
        problem = f"{missing[0].place}: {missing[0].file} does not exist"
        raise DataError(
            f"{table}: {problem}, and {len(missing) - 1} more files; add the files, or remove "
            "them from the table"
        )
    if missing:
        files = shorten([f"{row.file} ({row.place})" for row in missing])
        notes.append(
            f"{table}: left out, because they do not exist: {amount(len(missing), 'image')}: {files}"
        )
    return [row for row in rows.values() if row.path is not None]
