"""From the file of a table, or files beside images, to the cells of each image.

The cells of a table are texts by column: `file`, `classes` and, optionally, `split` and `group`.
Whether they are right is checked by `sopdeploy.photos.table`.
"""

import codecs
import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

from sopdeploy.class_names import read_class_names
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import advise_on, read_file, read_text
from sopdeploy.images.signatures import has_image_suffix
from sopdeploy.photos.files import (
    HELD_OUT,
    LABELS_FILE,
    TRAIN,
    VAL,
    list_images,
    lookalike_key,
    normalize,
    part_of,
)
from sopdeploy.photos.label_tools import (
    REQUIRED,
    SEPARATOR,
    is_of_via,
    read_cvat,
    read_entry,
    read_file_beside,
    read_json,
    read_via_csv,
    rename,
    without_brackets,
)
from sopdeploy.photos.listed_images import ListedImages, find_by_name

MAX_TABLE_BYTES = 1 << 28
# By the bytes with which a file begins; that of UTF-16 is the beginning of that of UTF-32.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
CSV_SEPARATORS = ",;\t"
# optional columns
SPLIT = "split"
GROUP = "group"
COLUMNS = (*REQUIRED, SPLIT, GROUP)
# Files with separated columns: one of these may have the classes under any name
SEPARATED = (".csv", ".tsv", ".txt")
MAX_SAMPLED = 30  # images or rows that tell what a table lists
# What the readers of label tools raise for other content than they expect.
_UNEXPECTED_CONTENT = (
    AttributeError, KeyError, RecursionError, TypeError, ValueError,
    csv.Error, ElementTree.ParseError,
)  # fmt: skip
# Of files beside images, and of those with the names of YOLO's classes
BESIDE = (".json", ".txt", ".xml")
YOLO_NAMES = (".yaml", ".yml", "classes.txt", ".names", "_darknet.labels")


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


def read_cells(
    table: Path, notes: list[str], images: ListedImages, column: str
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
    names = read_yolo_names(folder, others)

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


def read_yolo_names(folder: Path, others: Iterable[str]) -> tuple[str, ...]:
    """Return the names of YOLO's classes in the first file of *others* in *folder* that has some."""
    for other in sorted(others, key=lambda other: other.count("/")):
        if other.lower().endswith(YOLO_NAMES):
            with suppress(ConfigError):
                return read_class_names(folder / other)
    return ()


def _read_csv(
    table: Path, text: str, notes: list[str], images: ListedImages, column: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of each line of the CSV file *table*, which contains *text*.

    Without a column `classes`, other columns are classes with 1 and 0. *notes* gets a line about
    the columns that are left out. *column* is the heading of `classes`, "" for a usual one; if no
    column has a usual name for files, it is the first one with names of *images*.
    """
    try:
        # The columns, under the names that are known here.
        start = start_csv(text)
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
            others = shorten([name or "one without a heading" for name in names.values()])
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


def _find_columns(start: "CsvStart", columns: list[str], images: ListedImages) -> list[str]:
    """Name the first of *columns* with names of *images* in most rows `file`; of two, the other is `classes`.

    Nothing is changed if there is none, or if the column `file` is none.
    """
    lines = start.text.splitlines()[1 : 1 + MAX_SAMPLED]
    rows = [*csv.reader(lines, delimiter=start.separator, skipinitialspace=True)]
    candidates = [columns.index("file")] if "file" in columns else range(len(columns))
    for position in candidates:
        found = [
            len(row) > position and find_by_name(row[position], images.path_of_name) is not None
            for row in rows
        ]
        if 2 * sum(found) > len(found):
            named = [*columns[:position], "file", *columns[position + 1 :]]
            if len(named) == 2 and "classes" not in named:
                named[1 - position] = "classes"
            return named
    return columns


class CsvStart(NamedTuple):
    """A CSV file whose *text* begins with a heading.

    `lines_before` is added to a number of a line of *text* for that of the file. An added heading
    lowers it by 1.
    """

    text: str
    separator: str
    lines_before: int


def start_csv(text: str) -> CsvStart:
    """Find the separator of the CSV file *text*, and add a heading if it has none.

    The separator is that of a first line `sep=;`, or the most frequent one in the heading. If the
    first of two columns begins with the name of an image, there is no heading.
    """
    first_line, _, rest = text.partition("\n")
    separator = max(CSV_SEPARATORS, key=first_line.count)
    lines_before = 0
    if given_separator := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first_line, re.IGNORECASE):
        text = rest
        separator = given_separator[1]
        lines_before = 1

    first_cells = next(csv.reader([text.partition("\n")[0]], delimiter=separator), [])
    if len(first_cells) == 2 and has_image_suffix(first_cells[0].strip()):
        text = f"{separator.join(REQUIRED)}\n{text}"
        lines_before -= 1  # the heading is no line of the file
    return CsvStart(text, separator, lines_before)
