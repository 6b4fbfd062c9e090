"""Images with one or any number of classes each, listed in `labels.csv` of their folder.

    file,classes,split
    images/1.jpg,cat|dog,train
    images/2.jpg,,val

`classes` are separated by `|` and may be empty. If every image has exactly one class, the targets are class
indices, as for class folders. `split` is optional, as is `group`: images with the same one, such as a burst
or photographs of one object, are never divided. Paths are relative to the folder and cannot leave it.
"""

import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import DataError, shorten
from sopdeploy.photos.files import list_subfolders
from sopdeploy.photos.names import TRAIN, is_image
from sopdeploy.photos.photo import ImageFiles

LABELS_FILE = "labels.csv"
_REQUIRED = ("file", "classes")  # columns
SPLIT, GROUP = "split", "group"  # optional columns
SEPARATOR = "|"
VAL = "val"


@dataclass(frozen=True, slots=True)
class LabelTable:
    """The content of a `labels.csv`: the images with their classes, and their values of `split`.

    `images.targets` are (N, C) float32, 1 for the classes of an image, or class indices (N,) if every image
    has one class. `parts` (N,) are "train" or "val", and empty if the table has no column `split`.
    """

    images: ImageFiles
    parts: NDArray[np.str_]

    @property
    def is_split(self) -> bool:
        """Whether the table says which images are held out."""
        return bool(self.parts.size)

    def held_out(self) -> ImageFiles:
        """Select the held-out images, or all if the table is not split; raises `DataError` as `part` does."""
        return self.part(VAL) if self.is_split else self.images

    def part(self, name: str) -> ImageFiles:
        """Select the images of the part *name*; raises `DataError` if none of them has a class."""
        images = self.images.select(self.parts == name)
        if not images.class_counts().any():
            table = self.images.root / LABELS_FILE
            raise DataError(f"{table}: no image of split {name} has a class; add some")
        return images


def has_label_table(root: Path) -> bool:
    """Check whether the classes of the images in *root* are those of its `labels.csv`, not its class folders.

    A `labels.csv` with other columns counts only without class folders; reading it then raises an error.
    """
    path = root / LABELS_FILE
    if not path.is_file():
        return False
    start = path.read_bytes()[:1000]  # longer than any header
    header = start.partition(b"\n")[0].decode("utf-8-sig", "replace")
    columns = {column.strip(' "\r') for column in re.split("[,;\t]", header)}
    if columns & set(_REQUIRED):  # one right name is enough: reading the table names what is wrong
        return True
    folders = list_subfolders(root)
    has_class_folders = len(folders) >= 2 or TRAIN in folders  # a single folder may hold the listed images
    return not has_class_folders


def read_label_table(
    root: Path, labels: tuple[str, ...] | None = None, *, multi_label: bool | None = None
) -> LabelTable:
    """Read the `labels.csv` in *root*; its classes must be among *labels*, by default all classes, sorted.

    With *multi_label*, images may have any number of classes. By default, they may if an image of the table
    does not have exactly one. Raises `DataError` naming the line of the first invalid row, or the files that
    do not exist.
    """
    table = root / LABELS_FILE
    rows = _read_rows(table)
    missing = [row for row in rows if not (root / row.file).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more files" if len(missing) > 1 else ""
        problem = f"line {missing[0].line}: {missing[0].file} does not exist"
        raise DataError(f"{table}: {problem}{more}; add the file or remove the line")
    listed = set().union(*(row.classes for row in rows))
    labels = tuple(sorted(listed)) if labels is None else labels
    if len(labels) < 2:
        names = shorten(labels) or "none"
        raise DataError(f"{table}: has fewer than two classes ({names}); a network needs at least two")
    if unknown := sorted(listed - set(labels)):
        raise DataError(f"{table}: {shorten(unknown)} are not classes of the network; remove them")
    targets = _targets(table, rows, labels, multi_label)
    paths = np.asarray([os.fsencode(row.file) for row in rows], dtype=np.bytes_)
    parts = np.asarray([row.part for row in rows if row.part is not None], dtype=np.str_)  # all rows or none
    groups = None
    if any(row.group for row in rows):  # an image without one is a group of its own
        groups = np.asarray([f"group {row.group}" if row.group else f"file {row.file}" for row in rows])
    return LabelTable(ImageFiles(root, labels, paths, targets, groups), parts)


def _targets(
    table: Path, rows: list["_Row"], labels: tuple[str, ...], multi_label: bool | None
) -> NDArray[Any]:
    """Build the targets of *rows*: (N, C) if *multi_label* is true, class indices (N,) if it is false.

    None selects class indices if every image has exactly one class. Raises `DataError` if false does not fit.
    """
    targets = np.array([[label in row.classes for label in labels] for row in rows], dtype=np.float32)
    not_single = np.flatnonzero(targets.sum(axis=1) != 1)  # indices of rows
    is_multi_label = not_single.size > 0 if multi_label is None else multi_label
    if is_multi_label:
        return targets
    if not_single.size > 0:
        line = rows[not_single[0]].line
        raise DataError(
            f"{table}: line {line}: has no class or several, but the network predicts one; keep one class"
        )
    return targets.argmax(axis=1)


class _Row(NamedTuple):
    """The line number of an image, its path, classes, part (None without a column `split`) and group."""

    line: int
    file: str
    classes: set[str]
    part: str | None
    group: str


def _read_rows(table: Path) -> list[_Row]:
    """Read the rows of *table*; raises `DataError` for an invalid line."""
    try:
        reader = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        records = [(reader.line_num, record) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error}); write a CSV file in UTF-8") from error
    columns = reader.fieldnames or ()
    if {*columns} - {SPLIT, GROUP} != {*_REQUIRED}:
        raise DataError(
            f"{table}: has the columns {', '.join(columns) or 'none'}; write file,classes and optionally "
            "split and group, with commas"
        )
    if not records:
        raise DataError(f"{table}: lists no images; add a line per image")
    rows: dict[str, _Row] = {}
    for line, record in records:
        where = f"{table}: line {line}"
        if None in record or None in record.values():  # more or fewer cells than columns
            raise DataError(f"{where}: does not have {len(columns)} columns; quote names with commas")
        values = {column: value.strip() for column, value in record.items()}
        path = PurePosixPath(values["file"])
        file, listed, split = str(path), values["classes"], values.get(SPLIT)  # the split may be None
        classes = [name.strip() for name in listed.split(SEPARATOR)] if listed else []
        is_inside = not path.is_absolute() and ".." not in path.parts
        if not is_inside or not is_image(path.name):
            raise DataError(
                f"{where}: {values['file']!r} is not the path of an image, relative to the folder, without .."
            )
        if "" in classes:
            raise DataError(
                f"{where}: {listed!r} has an empty class name; separate classes by one {SEPARATOR}"
            )
        if split not in (TRAIN, VAL, None):
            raise DataError(f"{where}: split is {split!r}; write {TRAIN} or {VAL}")
        if file in rows:
            raise DataError(
                f"{where}: {file} is listed in line {rows[file].line}, too; keep one line per file"
            )
        rows[file] = _Row(line, file, set(classes), split, values.get(GROUP, ""))
    return list(rows.values())
