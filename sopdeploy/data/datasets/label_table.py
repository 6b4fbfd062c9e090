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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import Split, derive_seed, hold_out
from sopdeploy.data.folder_store import LABELS_FILE, REQUIRED, is_image, lists_images
from sopdeploy.data.image_files import FileStore, ImageFiles
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
    """Check whether *store* has a `labels.csv` that lists images.

    A file of this name with other columns is ignored next to class folders.
    """
    tables, folders = store.label_tables(), store.folders()
    if any(lists_images(content) for _, content in tables):
        return True
    return bool(tables) and len(folders) < 2 and TRAIN not in folders


def read_label_table(
    store: FileStore, labels: tuple[str, ...] | None = None, *, multi_label: bool | None = None
) -> LabelTable:
    """Read the `labels.csv` of *store*; its classes must be among *labels*, by default all classes, sorted.

    *multi_label*: images may have no class or several ones; by default the table itself decides. If
    several archives contain a `labels.csv`, their rows are joined. Raises `DataError` naming the line of
    the first invalid row, or the files that do not exist.
    """
    table = store.root / LABELS_FILE
    rows: dict[str, _Row] = {}
    for path, content in store.label_tables():
        rows |= _read_rows(path, content, rows)
    _check_files(store, rows)
    has_split = {row.part is not None for row in rows.values()}
    if len(has_split) > 1:
        raise DataError(f"{table}: only some archives have the column {SPLIT}; add it to all or to none")
    listed = set().union(*(row.classes for row in rows.values()))
    if labels is None:
        labels = tuple(sorted(listed))
        if len(labels) < 2:
            names = shorten(labels) or "none"
            raise DataError(f"{table}: has fewer than two classes ({names}); a network needs at least two")
    unknown = sorted(listed - set(labels))
    if unknown:
        raise DataError(f"{table}: {shorten(unknown)} are not classes of the network; remove them")
    other = next((row for row in rows.values() if len(row.classes) != 1), None)
    if multi_label is False and other is not None:
        _reject(table, other.line, "has no class or several, but the network predicts one; keep one class")
    targets: NDArray[Any]
    position = {label: index for index, label in enumerate(labels)}
    if other is None and not multi_label:
        targets = np.asarray(
            [position[name] for row in rows.values() for name in row.classes], dtype=np.int64
        )
    else:
        targets = np.zeros((len(rows), len(labels)), dtype=np.float32)
        for index, row in enumerate(rows.values()):
            targets[index, [position[name] for name in row.classes]] = 1
    paths = np.asarray([os.fsencode(name) for name in rows], dtype=np.bytes_)
    parts = np.asarray([row.part for row in rows.values()] if has_split == {True} else [])
    return LabelTable(ImageFiles(store, labels, paths, targets), parts)


def split_table(table: LabelTable, fraction: float, seed: int) -> Split:
    """Split *table* by its column `split`, or without this column hold out *fraction* of every class.

    Raises `DataError` naming a class without a training image.
    """
    path = table.images.store.root / LABELS_FILE
    if table.is_split:
        train, held_out = table.part(TRAIN), table.part(VAL)
    else:
        single = np.flatnonzero(table.images.class_counts() == 1)
        if single.size:
            name = table.images.labels[single[0]]
            raise DataError(f"{path}: only one image of {name}; add another, one has to be held out")
        keys = [path.decode("utf-8", "surrogateescape") for path in table.images.paths.tolist()]
        targets = table.images.targets
        if targets.ndim == 1:
            held = np.asarray(hold_out(keys, targets.tolist(), fraction, seed))
        else:
            held = hold_out_multi_label(table.images, keys, fraction, seed)
        train, held_out = table.images.select(~held), table.images.select(held)
    missing = np.flatnonzero(train.class_counts() == 0)
    if missing.size:
        name = table.images.labels[missing[0]]
        raise DataError(f"{path}: no training image of {name}; set the split of one to {TRAIN}")
    return Split(train=train, held_out=held_out, divided=not table.is_split)


def hold_out_multi_label(
    images: ImageFiles, keys: Sequence[str], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Select about *fraction* of every class of *images* for the held-out set; returns a mask (N,).

    Classes are processed from the rarest to the most frequent one, then the images without a class, as in the
    iterative stratification of Sechidis et al. (ECML 2011), section 4. The selection depends on *seed* and
    the *keys* (N,) of the images only.
    """
    shuffled = sorted(
        range(len(keys)), key=lambda index: (derive_seed(seed, "hold-out", keys[index]), keys[index])
    )
    held, decided = np.zeros((2, len(keys)), dtype=np.bool_)
    present: NDArray[np.bool_] = images.targets.astype(np.bool_)
    groups = list(present.T[np.argsort(images.class_counts(), kind="stable")])
    for members in [*groups, np.logical_not(present.any(axis=1))]:
        count = int(members.sum())
        wanted = min(max(1, round(fraction * count)), count - 1) - int((held & members).sum())
        open_members = members & ~decided
        free = [index for index in shuffled if open_members[index]]
        held[free[: max(0, wanted)]] = True
        decided |= members
    return held


class _Row(NamedTuple):
    """The table and line of an image, its classes, and its part, None without a column `split`."""

    table: Path
    line: int
    classes: set[str]
    part: str | None


def _read_rows(table: Path, content: bytes, others: Mapping[str, _Row]) -> dict[str, _Row]:
    """Read the rows of *table* by file name; reject files that occur twice, here or in *others*."""
    rows: dict[str, _Row] = {}
    header, records = _read_records(table, content)
    for line, record in records:
        if len(record) != len(header):
            _reject(table, line, f"has {len(record)} columns, not {len(header)}; quote names with commas")
        values = dict(zip(header, record, strict=True))
        name = _relative_path(table, line, values["file"])
        if (first := rows.get(name) or others.get(name)) is not None:
            where = f"line {first.line}" if first.table == table else f"{first.table}, line {first.line},"
            _reject(table, line, f"{name} is listed in {where} already; keep one line per file")
        part = values.get(SPLIT)
        if part not in (TRAIN, VAL, None):
            _reject(table, line, f"split is {part!r}; write {TRAIN} or {VAL}")
        rows[name] = _Row(table, line, _class_names(table, line, values["classes"]), part)
    return rows


def _read_records(table: Path, content: bytes) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read the column names in the *content* of *table*, and its records with their line numbers."""
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        lines = [(reader.line_num, [value.strip() for value in record]) for record in reader if record]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error}); write a CSV file in UTF-8") from error
    header = lines[0][1] if lines else []
    if sorted(header) not in (sorted(REQUIRED), sorted((*REQUIRED, SPLIT))):
        columns = ", ".join(header) or "none"
        raise DataError(
            f"{table}: has the columns {columns}; write file,classes and optionally split, with commas"
        )
    if len(lines) == 1:
        raise DataError(f"{table}: lists no images; add a line per image")
    return header, lines[1:]


def _relative_path(table: Path, line: int, name: str) -> str:
    """Normalize the path *name* of an image; reject one that is not below the folder."""
    path = PurePosixPath(name)
    if not name or "\0" in name:
        _reject(table, line, "has no file; write its path relative to the folder")
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        _reject(table, line, f"{name} is outside the folder; write a path relative to the folder, without ..")
    if not is_image(path.name):
        _reject(table, line, f"{name} has no suffix of an image, such as .jpg or .png; convert or rename it")
    return str(path)


def _class_names(table: Path, line: int, text: str) -> set[str]:
    names = [name.strip() for name in text.split(SEPARATOR)] if text else []
    if not all(names):
        _reject(table, line, f"{text!r} has an empty class name; separate classes by one {SEPARATOR}")
    return set(names)


def _check_files(store: FileStore, rows: Mapping[str, _Row]) -> None:
    missing = [name for name in rows if not store.has_file(name)]
    if missing:
        row, more = rows[missing[0]], f", and {len(missing) - 1} more files" if len(missing) > 1 else ""
        _reject(row.table, row.line, f"{missing[0]} does not exist{more}; add the file or remove the line")


def _reject(table: Path, line: int, reason: str) -> NoReturn:
    raise DataError(f"{table}: line {line}: {reason}")
