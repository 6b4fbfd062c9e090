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

Without `labels.csv`, another table counts that lists the images, whatever its name: such a
table, JSON lines with `file_name` and `label`, a COCO file whose images have annotations of one category
each, or the classes of images, or else of their regions, in files of CVAT, VIA and Label
Studio. Images that these list without a class are left out.
"""

import codecs
import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from sopdeploy.class_names import read_class_names
from sopdeploy.errors import ConfigError, DataError, amount, shorten
from sopdeploy.files import advise_on, read_file, read_text
from sopdeploy.images.signatures import count_suffixes, has_image_suffix, is_image
from sopdeploy.photos.files import (
    FILES,
    FOLDERS,
    HELD_OUT,
    TRAIN,
    check_labels,
    describe_confusable,
    hint_at_spelling,
    list_images,
    lookalike_key,
    normalize,
    part_kind,
    part_of,
)
from sopdeploy.photos.label_tools import (
    REQUIRED,
    SEPARATOR,
    UPLOADED,
    is_of_via,
    read_cvat,
    read_entry,
    read_file_beside,
    read_json,
    read_via_csv,
    rename,
    without_brackets,
)
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.project import AS_IT_IS, FolderReading

LABELS_FILE = "labels.csv"
MAX_TABLE_BYTES = 1 << 28
# By the bytes with which a file begins; that of UTF-16 is the beginning of that of UTF-32.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_SEPARATORS = ",;\t"
# optional columns
SPLIT = "split"
GROUP = "group"
COLUMNS = (*REQUIRED, SPLIT, GROUP)
# of classes
SEPARATORS = re.compile(r"[|;]")
# Files with separated columns: one of these may have the classes under any name
SEPARATED = (".csv", ".tsv", ".txt")
MAX_COLUMNS = 4  # of one table that are tried
# A table is read without its rows of missing images if these are at most this share, or few.
MAX_MISSING = 0.05
MANY_MISSING = 3
# Tables that are searched, images, and bytes
MAX_TABLES = 20
MAX_SAMPLED = 30
MAX_SEARCHED = 2**24
SPREADSHEETS = (".numbers", ".ods", ".xls", ".xlsx")  # which nothing here reads
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml")
# What the readers of label tools raise for other content than they expect.
_UNEXPECTED_CONTENT = (
    AttributeError, KeyError, RecursionError, TypeError, ValueError,
    csv.Error, ElementTree.ParseError,
)  # fmt: skip
# Of files beside images, and of those with the names of YOLO's classes
BESIDE = (".json", ".txt", ".xml")
YOLO_NAMES = (".yaml", ".yml", "classes.txt", ".names", "_darknet.labels")
VAL = "val"
UNSPLIT = "all"  # the name of the only part if the images are not split


class OpenedParts(NamedTuple):
    """The images of a data set by part, the training images first.

    Attributes:
        problems: Why a network cannot be trained on them.
        notes: What the user may not have intended.
        ignored: Number of files that are no images, by suffix.
        reading: How the folder was read.
    """

    parts: dict[str, ImageFiles]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    ignored: Mapping[str, int] = {}
    reading: FolderReading = AS_IT_IS


def find_table(root: Path) -> Path | None:
    """Find the table with the classes of the images in *root*; None if its folders are the classes.

    This is `labels.csv`, or else another table, if no two folders may be the classes. It must list
    all images or, if some are directly in `train/`, all of these, as Kaggle's tables do. More than
    half of its rows must have a class. Raises `DataError` for a `labels.csv` that cannot be read,
    and for a spreadsheet `labels.*`.
    """
    path = root / LABELS_FILE
    if os.path.lexists(path) and not path.is_dir():  # a folder may be a class
        read_table_text(path)  # only for its error
        return path

    files = sorted(root.glob("*.*"))
    for file in files:
        if file.stem.lower() == "labels" and file.suffix.lower() in SPREADSHEETS:
            raise DataError(
                f"{file}: not read; save it as {LABELS_FILE} with the columns file,classes, or add "
                f"--set data.classes_from={FOLDERS} if the folders are the classes"
            )
    if not any(file.suffix.lower() in TABLE_SUFFIXES for file in files):
        return None
    images, _other_files = list_images(root)
    tops = {os.fsdecode(path).partition("/")[0] for path in images if b"/" in path}
    if sum(not part_kind(top) for top in tops) > 1:
        return None
    tables = (table for table, column in find_listing_tables(images, files) if not column)
    return next((table for table in tables if _labels_all_images(root, table, images)), None)


def named_table(root: Path, classes_from: str) -> tuple[Path, str] | None:
    """Return the table in *root* that the setting *classes_from* names, and its column; None for others.

    Of `FILES`, it is *root* itself, whose images have their classes in files beside them.
    """
    if classes_from == FILES:
        images, others = list_images(root)
        is_labelled = pair_with_files([os.fsdecode(path) for path in images], others)
        return (root, "") if is_labelled else None

    name, _, column = classes_from.partition(":")
    table = root / name
    return (table, column) if table.is_file() else None


def _labels_all_images(root: Path, table: Path, images: list[bytes]) -> bool:
    """Tell whether *table* lists the *images* in *root* as `find_table` demands."""
    try:
        rows = _read_rows(table, images, root)
    except DataError:
        return False

    in_train = [path for path in images if path.rpartition(b"/")[0] == os.fsencode(TRAIN)]
    lists_all = {row.path for row in rows} >= {*(in_train or images)}
    num_labelled = sum(row.classes is not None for row in rows)
    return lists_all and 2 * num_labelled > len(rows)


def read_table_text(table: Path) -> str:
    """Read *table* in UTF-8 or, with a byte order mark, in UTF-16 or UTF-32.

    Raises `DataError` if it cannot be read or decoded, or is empty.
    """
    try:
        content = read_file(table, MAX_TABLE_BYTES)
    except OSError as error:
        advice = advise_on(error, "replace it by a CSV file, or remove it")
        raise DataError(f"{table}: {advice}") from error

    # Decode it by its mark; the error names the line that is wrong.
    encoding = next(
        (name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8"
    )
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it has null characters, as UTF-16 without a byte order mark")
    except UnicodeDecodeError as error:
        written = encoding.removesuffix("-sig").upper()
        # The line is known in UTF-8 only: in other encodings, other characters have the byte of a
        # line break, too.
        where = "it"
        if written == "UTF-8":
            number = error.object.count(b"\n", 0, error.start) + 1
            where = f"line {number}"
        raise DataError(
            f"{table}: cannot be read ({where} is not {written}); write a CSV file in UTF-8, "
            "in a spreadsheet the format 'CSV UTF-8'"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{table}: cannot be read ({error}); write a CSV file in UTF-8"
        ) from error

    if not text.strip():
        raise DataError(
            f"{table}: is empty; list the images and their classes in it, or remove it"
        )
    return text


def read_label_table(
    table: Path,
    labels: tuple[str, ...] | None = None,
    *,
    multi_label: bool | None = None,
    root: Path | None = None,
    column: str = "",
) -> OpenedParts:
    """Read *table*, whose classes must be among *labels*; by default, these are its classes, sorted.

    It lists images in *root*, by default its folder. If it is a folder, the files beside its images
    have the classes. *column* is the heading above the classes, if it is no usual one.

    The parts are `train` and `val`, or `UNSPLIT` without a column `split`. Their targets are
    (N, C) float32, 1 for the classes of an image, or class indices (N,). *multi_label* is by
    default true if an image does not have exactly one class. Raises `DataError` for the first
    invalid row, by its place in the table, for many missing files, for fewer than two classes, and
    for other classes than *labels*.
    """
    root = table.parent if root is None else root
    image_paths, other_files = list_images(root)
    notes: list[str] = []
    all_rows = _read_rows(table, image_paths, root, notes, column)

    # Label tools list all images, also those that nobody has labelled.
    rows = [row for row in all_rows if row.classes is not None]
    if unlabelled := [row.file for row in all_rows if row.classes is None]:
        files = f"{amount(len(unlabelled), 'image')}: {shorten(unlabelled)}"
        notes.append(f"{table}: left out, because they have no class there: {files}")

    # The classes, which a network may prescribe.
    listed = {label for row in rows for label in row.classes or ()}
    labels = tuple(sorted(listed)) if labels is None else labels
    check_labels(table, labels)
    if len(labels) < 2:
        names = shorten(labels) or "none"
        raise DataError(
            f"{table}: has fewer than two classes ({names}); a network needs at least two"
        )
    if unknown := sorted(listed - set(map(normalize, labels))):
        hint = hint_at_spelling(unknown, labels)
        raise DataError(
            f"{table}: {shorten(unknown)} are not classes of the network; remove them{hint}"
        )

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

    # What the user may not have intended.
    notes += [f"{table}: {line}" for line in describe_confusable(listed)]
    if unlisted := sorted({*image_paths} - {row.path for row in all_rows}):
        files = shorten([str(root / os.fsdecode(path)) for path in unlisted])
        notes.append(f"not listed in {table.name}: {amount(len(unlisted), 'image')}: {files}")
    used = {table.name}
    if table.is_dir():
        used = {
            *pair_with_files([os.fsdecode(path) for path in image_paths], other_files).values()
        }
    ignored = count_suffixes(file for file in other_files if file not in used)
    return OpenedParts(parts, notes=notes, ignored=ignored)


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
            f"{table}: {place}: has no class or several, but the network predicts "
            "one; keep one class"
        )
    return targets.argmax(axis=1)


class _Row(NamedTuple):
    """An image of a table.

    The place is "line 3" or "image 3" (`_read_cells`). The classes are None if nobody has
    labelled the image in a label tool, the part is None without a column `split`, and the path
    until the file is found.
    """

    place: str
    file: str
    classes: set[str] | None
    part: str | None
    group: str
    path: bytes | None


def _read_rows(
    table: Path,
    image_paths: list[bytes],
    root: Path,
    notes: list[str] | None = None,
    column: str = "",
) -> list[_Row]:
    """Read the rows of *table*; *image_paths* are the images in *root*. Raises `DataError`.

    *notes* gets lines about the columns and the missing images that are left out.
    """
    images = _ListedImages(root, image_paths)
    notes = [] if notes is None else notes
    rows: dict[bytes | str, _Row] = {}
    for place, cells in _read_cells(table, notes, images, column):
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
    if len(missing) >= MANY_MISSING and len(missing) > MAX_MISSING * len(rows):
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


class _ListedImages:
    """The images of the folder *root*, with *paths* in it, that a table lists."""

    def __init__(self, root: Path, paths: list[bytes]) -> None:
        self.root = root
        # File systems encode one name in several ways.
        self.path_in_folder = {normalize(os.fsdecode(path)): path for path in paths}
        self.path_of_name = _index_names(paths)

    def find(self, name: str, where: str) -> tuple[PurePosixPath, bytes | None]:
        """Return the path that *name* is, and the path of the image that it means; None if there is none.

        Raises `DataError`, about the place *where*, unless *name* is a path in the folder, with
        the suffix of an image, or the name of one image.
        """
        has_windows_path = "\\" in name and not (self.root / name).is_file()
        file = PurePosixPath(name.replace("\\", "/") if has_windows_path else name)
        exists = (self.root / file).is_file()
        names_image = has_image_suffix(file.name)
        if exists:
            names_image = is_image(self.root / file)

        is_path_outside = file.is_absolute() or ".." in file.parts
        named_path = _find_by_name(name, self.path_of_name)  # None: no image, or several
        is_missing = not exists and normalize(name) not in self.path_of_name
        may_be_id = is_missing and not file.suffix and not (self.root / file).exists()
        if named_path is None and (is_path_outside or not (names_image or may_be_id)):
            raise DataError(
                f"{where}: {name!r} is not the path of an image, relative to the "
                "folder, without .., or the name of one image in it"
            )

        if exists:
            return file, os.fsencode(file)
        # It may be there in another encoding, or elsewhere.
        return file, self.path_in_folder.get(normalize(str(file)), named_path)


def _index_names(image_paths: list[bytes]) -> dict[str, bytes | None]:
    """Map the names of images, with and without suffix, to their paths; None if several have the name."""
    path_of_name: dict[str, bytes | None] = {}
    for path in image_paths:
        file = PurePosixPath(normalize(os.fsdecode(path)))
        for name in {file.name, file.stem}:
            path_of_name[name] = None if name in path_of_name else path
    return path_of_name


def _find_by_name(name: str, path_of_name: Mapping[str, bytes | None]) -> bytes | None:
    """Find the one image that *name* means; None if it is none, or several.

    *name* may be the name of a file, a path elsewhere, or an address: Label Studio writes
    `/data/upload/1/0a1b2c3d-photo.jpg` for an uploaded image, and
    `/data/local-files/?d=folder/photo.jpg` for one of a folder. *path_of_name* is the result of
    `_index_names`.
    """
    path = PurePosixPath(unquote(name.rpartition("?d=")[2]).replace("\\", "/"))
    names = [name]
    if ".." not in path.parts and len(path.parts) > 1:
        names.append(path.name)
    if uploaded := UPLOADED.fullmatch(path.name):
        names.append(uploaded[1])
    paths = (path_of_name.get(normalize(each)) for each in names)
    return next((each for each in paths if each is not None), None)


def find_listing_tables(
    images: Sequence[bytes], files: Iterable[Path]
) -> Iterator[tuple[Path, str]]:
    """Yield those of *files* that list the *images*, and the columns that may be their classes.

    Such a file contains the names of at least half of a sample of the images (`MAX_SAMPLED`), with
    or without suffix. A single image is no sample: any text may have its name. The beginnings of
    `MAX_TABLES` files are searched. The column is "" if it has a usual name.
    """

    tables = [
        file
        for file in files
        if file.suffix.lower() in TABLE_SUFFIXES and file.name != LABELS_FILE and file.is_file()
    ]
    sample = images[:: -(-len(images) // MAX_SAMPLED)] if images else []
    names = [PurePosixPath(os.fsdecode(path)) for path in sample]
    if len(names) < 2:
        return

    for table in tables[:MAX_TABLES]:
        with suppress(OSError):
            with table.open("rb") as file:
                text = file.read(MAX_SEARCHED).decode("utf-8", "replace")
            if 2 * sum(_is_named(name, text) for name in names) >= len(names):
                for column in _class_columns(table, text, names):
                    yield table, column


def _class_columns(table: Path, text: str, names: Sequence[PurePosixPath]) -> list[str]:
    """Return the headings of the CSV file *table* above what may be classes, or "" for a usual heading.

    These repeat: each has two values or more, and three rows or more per value. *names* are those
    of images.
    """
    if table.suffix.lower() not in SEPARATED or is_of_via(text):
        return [""]
    try:
        start = _start_csv(text.removeprefix("\ufeff"))
        reader = csv.reader(io.StringIO(start.text, newline=""), delimiter=start.separator)
        headings = [heading.strip() for heading in next(reader, [])]
        rows = [row for row in reader if len(row) == len(headings)]
    except csv.Error:
        return [""]

    known = rename([lookalike_key(heading) for heading in headings])
    if "classes" in known or len(headings) <= 2:
        return [""]
    stems = {one for name in names for one in (name.name, name.stem)}
    found = []
    for position, heading in enumerate(headings):
        values = [row[position].strip() for row in rows]
        are_files = any(PurePosixPath(value).name in stems for value in values)
        count = len({*values})
        if (
            not are_files
            and count >= 2
            and 3 * count <= len(values)
            and not _are_numbers(values)
        ):
            found.append(heading)
    # Columns with 1 and 0 are classes themselves.
    return found[:MAX_COLUMNS] or [""]


def _are_numbers(values: Iterable[str]) -> bool:
    """Tell whether some of *values* are measured: numbers with a point."""
    return any(re.fullmatch(r"-?\d*\.\d+", value) for value in values)


def _is_named(image: PurePosixPath, text: str) -> bool:
    """Tell whether *text* contains the name of *image*, or its stem of four characters or more, as a word.

    A shorter stem must be the first cell of a line.
    """
    first_cell = rf'^"?{re.escape(image.stem)}"?[{_SEPARATORS}]'
    if image.stem in text and re.search(first_cell, text, re.MULTILINE):
        return True
    names = [image.name, image.stem] if len(image.stem) > 3 else [image.name]
    return any(
        re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names if name in text
    )


def _read_cells(
    table: Path, notes: list[str], images: _ListedImages, column: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells by column of each image; raises `DataError` at the first invalid one.

    The place is "line 3" of a file with a line per image. In JSON, in XML and in VIA's CSV, it is
    "image 3", counted from 1. *notes* gets a line about the columns of a CSV file that are left
    out. *images* tell which column of an unusual CSV file has their names, and *column* has the
    classes there.
    """
    if table.is_dir():
        yield from _read_files_beside(table)
        return
    text = read_table_text(table)
    if table.suffix.lower() in SEPARATED and not is_of_via(text):
        yield from _read_csv(table, text, notes, images, column)
        return

    unit = "image"
    try:
        cells_of_images: Iterable[dict[str, str]]
        if table.suffix.lower() in SEPARATED:
            cells_of_images = read_via_csv(text)
        elif table.suffix == ".xml":
            cells_of_images = read_cvat(text)
        elif table.suffix == ".json":
            cells_of_images = read_json(json.loads(text))
        else:
            cells_of_images = (read_entry(json.loads(line)) for line in text.splitlines())
            unit = "line"
        for number, cells in enumerate(cells_of_images, 1):
            yield f"{unit} {number}", cells
    except _UNEXPECTED_CONTENT as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise DataError(
            f"{table}: does not give each image its classes{reason}; write {LABELS_FILE}"
        ) from error


def pair_with_files(images: Sequence[str], others: Iterable[str]) -> dict[str, str]:
    """Return for each of *images* that one of *others* has its name, the path of this file.

    It has the name with another suffix, or with one more. Of several, it is in the folder with the
    most words of the path of the image, as `train/labels/1.txt` for `train/images/1.jpg`.
    """
    by_stem = defaultdict[str, list[PurePosixPath]](list)
    for other in others:
        if other.lower().endswith(BESIDE):
            file = PurePosixPath(normalize(other))
            by_stem[file.stem].append(file)

    paired = dict[str, str]()
    for image in images:
        file = PurePosixPath(normalize(image))
        found = by_stem.get(file.stem) or by_stem.get(file.name)
        if found:
            nearest = max(found, key=lambda other: len({*other.parts} & {*file.parts}))
            paired[image] = str(nearest)
    return paired


def _read_files_beside(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name and the cells of each image in *folder* of which another file has the classes.

    Folders with the names of parts divide the images: the training images, and those of the best
    held-out part. Others are left out.
    """
    listed, others = list_images(folder)
    files = pair_with_files([os.fsdecode(path) for path in listed], others)
    names = _read_yolo_names(folder, others)

    # The training part, and the best of the others.
    parts = set(map(part_of, files))
    held_out = next((part for part in HELD_OUT if part in parts), "")
    is_divided = held_out and TRAIN in parts

    texts = set[str]()
    found = list[tuple[str, dict[str, str]]]()
    for file, other in files.items():
        suffix = PurePosixPath(other).suffix.lower()
        try:
            text = read_text(folder / other, MAX_TABLE_BYTES)
            classes = read_file_beside(text, suffix, names)
        except OSError as error:
            raise DataError(f"{folder / other}: {advise_on(error, 'remove it')}") from error
        except _UNEXPECTED_CONTENT as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise DataError(
                f"{folder / other}: does not give its image a class{reason}; write {LABELS_FILE}"
            ) from error

        cells = {"file": file}
        if classes:
            cells["classes"] = SEPARATOR.join(sorted(classes))
        if is_divided:
            cells[SPLIT] = TRAIN if part_of(file) == TRAIN else VAL
        if not is_divided or part_of(file) in (TRAIN, held_out):
            found.append((other, cells))
        if suffix == ".txt":
            texts.add(text)

    # Texts that are nearly all different, such as captions, are no classes.
    if 2 * len(texts) > len(found) and not names:
        raise DataError(
            f"{folder}: the texts beside the images are no classes, because most differ; write {LABELS_FILE}"
        )
    yield from found


def _read_yolo_names(folder: Path, others: Iterable[str]) -> tuple[str, ...]:
    """Return the names of YOLO's classes in the first file of *others* in *folder* that has some."""
    for other in sorted(others, key=lambda other: other.count("/")):
        if other.lower().endswith(YOLO_NAMES):
            with suppress(ConfigError):
                return read_class_names(folder / other)
    return ()


def _read_csv(
    table: Path, text: str, notes: list[str], images: _ListedImages, column: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of each line of the CSV file *table*, which contains *text*.

    Without a column `classes`, other columns are classes with 1 and 0. *notes* gets a line about
    the columns that are left out. *column* is the heading of `classes`, "" for a usual one; if no
    column has a usual name for files, it is the first one with names of *images*.
    """
    try:
        # The columns, under the names that are known here.
        start = _start_csv(text)
        reader = csv.DictReader(
            io.StringIO(start.text, newline=""),
            delimiter=start.separator,
            strict=True,
            skipinitialspace=True,
        )
        written = [name.strip() for name in reader.fieldnames or ()]
        headings = [lookalike_key(column) for column in written]
        columns = rename(headings, column)
        if not {*REQUIRED} <= {*columns}:
            columns = _find_columns(start, columns, images)
        reader.fieldnames = columns
        wrong_columns = DataError(
            f"{table}: has the columns {shorten(headings) or 'none'}; write "
            "file,classes and optionally split and group, or rename the file if "
            "the folders are the classes"
        )

        # Classes can have a column each, instead of one column for all.
        names = {
            column: name
            for column, name in zip(columns, written, strict=True)
            if column not in COLUMNS
        }
        if "classes" in columns and names:
            others = shorten([*names.values()])
            notes.append(f"{table}: these columns are left out: {others}")
            names = {}

        is_doubled = len({*columns}) < len(columns)
        if "file" not in columns or is_doubled or not (names or "classes" in columns):
            raise wrong_columns

        # The cells of each line, with the classes in one of them.
        for record in reader:
            line = reader.line_num + start.lines_before
            if None in record or None in record.values():  # more or fewer cells than columns
                raise DataError(
                    f"{table}: line {line}: does not have {len(columns)} columns; "
                    "quote names with commas"
                )

            cells = {name: value.strip() for name, value in record.items()}
            if names:
                if not {cells[column] for column in names} <= {"0", "1"}:
                    raise wrong_columns
                cells["classes"] = SEPARATOR.join(
                    names[column] for column in names if cells[column] == "1"
                )
            cells["classes"] = without_brackets(cells["classes"])
            yield (
                f"line {line}",
                {column: cells[column] for column in COLUMNS if column in cells},
            )
    except csv.Error as error:
        raise DataError(
            f"{table}: cannot be read ({error}); write a CSV file in UTF-8"
        ) from error


def _find_columns(start: "_CsvStart", columns: list[str], images: _ListedImages) -> list[str]:
    """Name the first of *columns* with names of *images* in most rows `file`; of two, the other is `classes`.

    Nothing is changed if there is none, or if the column `file` is none.
    """
    lines = start.text.splitlines()[1 : 1 + MAX_SAMPLED]
    rows = [*csv.reader(lines, delimiter=start.separator, skipinitialspace=True)]
    candidates = [columns.index("file")] if "file" in columns else range(len(columns))
    for position in candidates:
        found = [
            len(row) > position
            and _find_by_name(row[position], images.path_of_name) is not None
            for row in rows
        ]
        if 2 * sum(found) > len(found):
            named = [*columns[:position], "file", *columns[position + 1 :]]
            if len(named) == 2 and "classes" not in named:
                named[1 - position] = "classes"
            return named
    return columns


class _CsvStart(NamedTuple):
    """A CSV file whose *text* begins with a heading.

    `lines_before` is added to a number of a line of *text* for that of the file. An added heading
    lowers it by 1.
    """

    text: str
    separator: str
    lines_before: int


def _start_csv(text: str) -> _CsvStart:
    """Find the separator of the CSV file *text*, and add a heading if it has none.

    The separator is that of a first line `sep=;`, or the most frequent one in the heading. If the
    first of two columns begins with the name of an image, there is no heading.
    """
    first_line, _, rest = text.partition("\n")
    separator = max(_SEPARATORS, key=first_line.count)
    lines_before = 0
    if given_separator := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first_line, re.IGNORECASE):
        text = rest
        separator = given_separator[1]
        lines_before = 1

    first_cells = next(csv.reader([text.partition("\n")[0]], delimiter=separator), [])
    if len(first_cells) == 2 and has_image_suffix(first_cells[0].strip()):
        text = f"{separator.join(REQUIRED)}\n{text}"
        lines_before -= 1  # the heading is no line of the file
    return _CsvStart(text, separator, lines_before)
