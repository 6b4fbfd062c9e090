"""Images with one or any number of classes each, listed in `labels.csv` of a folder or of tar archives.

    file,classes,split
    images/1.jpg,cat|dog,train
    images/2.jpg,,val

`classes` are separated by `|` and may be empty. If every image has exactly one class, the table is one of
images with one class each, as class folders are. `split` is optional. Paths are relative to the folder, or to
the top of the archives, and cannot leave it.
"""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import Split
from sopdeploy.data.folder_store import LABELS_FILE, REQUIRED, is_image, lists_images
from sopdeploy.data.image_files import FileStore, ImageFiles, divide
from sopdeploy.errors import DataError, shorten

SEPARATOR = "|"
TRAIN, VAL = "train", "val"
SPLIT = "split"


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
            table = self.images.store.root / LABELS_FILE
            raise DataError(f"{table}: no image of split {name} has a class; add some")
        return images


def has_label_table(store: FileStore) -> bool:
    """Check whether the classes of *store* are those of its `labels.csv`, not its class folders.

    A `labels.csv` with other columns counts only without class folders; reading it then raises an error.
    """
    tables, folders = store.label_tables(), store.folders()
    if any(lists_images(content) for _, content in tables):
        return True
    has_class_folders = len(folders) >= 2 or TRAIN in folders
    return bool(tables) and not has_class_folders


def read_label_table(
    store: FileStore, labels: tuple[str, ...] | None = None, *, multi_label: bool | None = None
) -> LabelTable:
    """Read the `labels.csv` of *store*; its classes must be among *labels*, by default all classes, sorted.

    With *multi_label*, images may have any number of classes; by default, they may if an image of the table
    does not have exactly one. If several archives contain a `labels.csv`, their rows are joined. Raises
    `DataError` naming the line of the first invalid row, or the files that do not exist.
    """
    table = store.root / LABELS_FILE
    rows: dict[str, _Row] = {}
    for path, content in store.label_tables():
        _read_rows(path, content, rows)
    missing = [name for name in rows if not store.has_file(name)]
    if missing:
        more = f", and {len(missing) - 1} more files" if len(missing) > 1 else ""
        rows[missing[0]].reject(f"{missing[0]} does not exist{more}; add the file or remove the line")
    has_split = {row.part is not None for row in rows.values()}
    if len(has_split) > 1:
        raise DataError(f"{table}: only some archives have the column {SPLIT}; add it to all or to none")
    listed = set().union(*(row.classes for row in rows.values()))
    labels = tuple(sorted(listed)) if labels is None else labels
    if len(labels) < 2:
        names = shorten(labels) or "none"
        raise DataError(f"{table}: has fewer than two classes ({names}); a network needs at least two")
    unknown = sorted(listed - set(labels))
    if unknown:
        raise DataError(f"{table}: {shorten(unknown)} are not classes of the network; remove them")
    targets: NDArray[Any] = np.zeros((len(rows), len(labels)), dtype=np.float32)
    position = {label: index for index, label in enumerate(labels)}
    for index, row in enumerate(rows.values()):
        targets[index, [position[name] for name in row.classes]] = 1
    not_single = np.flatnonzero(targets.sum(axis=1) != 1)
    if multi_label is False and not_single.size:
        reason = "has no class or several, but the network predicts one; keep one class"
        list(rows.values())[not_single[0]].reject(reason)
    if not multi_label and not not_single.size:
        targets = targets.argmax(axis=1)
    paths = np.asarray([os.fsencode(name) for name in rows], dtype=np.bytes_)
    parts = np.asarray([row.part for row in rows.values()] if has_split == {True} else [])
    return LabelTable(ImageFiles(store, labels, paths, targets), parts)


def split_table(table: LabelTable, fraction: float, seed: int) -> Split:
    """Split *table* by its column `split`, or without this column hold out *fraction* of every class.

    Raises `DataError` naming a class without a training image.
    """
    if table.is_split:
        train, held_out = table.part(TRAIN), table.part(VAL)
    else:
        train, held_out = divide(table.images, fraction, seed)
    missing = np.flatnonzero(train.class_counts() == 0)
    if missing.size:
        path, name = table.images.store.root / LABELS_FILE, table.images.labels[missing[0]]
        raise DataError(f"{path}: no training image of {name}; set the split of one to {TRAIN}")
    return Split(train=train, held_out=held_out, divided=not table.is_split)


class _Row(NamedTuple):
    """The table and line of an image, its classes, and its part, None without a column `split`."""

    table: Path
    line: int
    classes: set[str]
    part: str | None

    def reject(self, reason: str) -> NoReturn:
        raise DataError(f"{self.table}: line {self.line}: {reason}")


def _read_rows(table: Path, content: bytes, rows: dict[str, _Row]) -> None:
    """Add the rows of *table* to *rows*, by file name; raises `DataError` for an invalid line."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        records = [(reader.line_num, record) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error}); write a CSV file in UTF-8") from error
    columns = reader.fieldnames or ()
    if {*columns} - {SPLIT} != {*REQUIRED}:
        raise DataError(
            f"{table}: has the columns {', '.join(columns) or 'none'}; write file,classes and optionally "
            "split, with commas"
        )
    if not records:
        raise DataError(f"{table}: lists no images; add a line per image")
    for line, record in records:
        if None in record or None in record.values():
            _Row(table, line, set(), None).reject(
                f"does not have {len(columns)} columns; quote names with commas"
            )
        values = {column: value.strip() for column, value in record.items()}
        classes = [name.strip() for name in values["classes"].split(SEPARATOR) if values["classes"]]
        row = _Row(table, line, set(classes), values.get(SPLIT))
        path = PurePosixPath(values["file"])
        if path.is_absolute() or ".." in path.parts or not is_image(path.name):
            row.reject(f"{values['file']!r} is not the path of an image, relative to the folder, without ..")
        if "" in classes:
            row.reject(f"{values['classes']!r} has an empty class name; separate classes by one {SEPARATOR}")
        if row.part not in (TRAIN, VAL, None):
            row.reject(f"split is {row.part!r}; write {TRAIN} or {VAL}")
        if str(path) in rows:
            first = rows[str(path)]
            row.reject(f"{path} is listed in {first.table}, line {first.line}, too; keep one line per file")
        rows[str(path)] = row
