"""From a CSV file to the cells of each image.

The cells of a table are texts by column: `file`, `classes` and, optionally, `split` and `group`.
Whether they are right is checked by `sopdeploy.data.folders.table`.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sopdeploy.base.files import advise_on, read_file
from sopdeploy.data.photos.listed_images import ListedImages, find_by_name
from sopdeploy.data.photos.spelling import lookalike_key
from sopdeploy.errors import DataError, shorten
from sopdeploy.images.signatures import has_image_suffix

SEPARATOR = "|"  # of classes
REQUIRED = ("file", "classes")  # columns
# Of the required columns, also in tables of other programs; of several, the first counts.
_NAMES = {
    "file": (
        *("file", "filename", "file name", "file_name", "image", "image_name", "path"),
        *("image_id", "id"),
    ),
    "classes": ("classes", "class", "labels", "label", "choices", "choice", "annotations"),
}
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
SEPARATED = (".csv", ".tsv")
MAX_SAMPLED = 30  # rows that tell what a column lists


def is_table(name: str) -> bool:
    """Tell whether the file *name* may be a table of labels."""
    return name.lower().endswith(SEPARATED)


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
            f"{table}: cannot be read ({where} is not {written}); write a CSV file in UTF-8 "
            "(in a spreadsheet, choose the format 'CSV UTF-8')"
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
    """Yield the place, such as "line 3", and the cells by column of each image of the CSV file *table*.

    Without a column `classes`, other columns are classes with 1 and 0. *notes* gets a line about
    the columns that are left out. *column* is the heading of `classes`, "" for a usual one; if no
    column has a usual name for files, it is the first one with names of *images*.
    """
    text = read_table_text(table)
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
                    "quote names that contain commas"
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
    """Find the separator of the CSV file of labels *text*, and add a heading if it has none.

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
        lines_before -= 1  # the heading is not a line of the file
    return CsvStart(text, separator, lines_before)


def rename(headings: Sequence[str], classes: str = "") -> list[str]:
    """Name the columns with *headings* of a file and its classes as `REQUIRED`; the others stay.

    *classes* is the heading of the classes, if it is none of the usual ones.
    """
    columns = [*headings]
    usual = _NAMES | ({"classes": (lookalike_key(classes),)} if classes else {})
    for column, names in usual.items():
        name = next((name for name in names if name in headings), None)
        if name is not None:
            columns[headings.index(name)] = column
    return columns


def without_brackets(classes: str) -> str:
    """Separate *classes* like `[cat,dog]`, as makesense and Python write a list; others stay.

    Several choices of Label Studio, `{"choices":["cat","dog"]}`, are also separated.
    """
    if classes.startswith('{"choices"'):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            return SEPARATOR.join(json.loads(classes)["choices"])
    if not (classes.startswith("[") and classes.endswith("]")):
        return classes
    return SEPARATOR.join(name.strip(" '\"") for name in classes[1:-1].split(","))
