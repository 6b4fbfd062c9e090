"""Which file of a folder is the table with the classes of its images, and which column has them."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from sopdeploy.errors import DataError
from sopdeploy.photos.cells import (
    COLUMNS,
    CSV_SEPARATORS,
    MAX_SAMPLED,
    SEPARATED,
    pair_with_files,
    read_table_text,
    start_csv,
)
from sopdeploy.photos.files import (
    FILES,
    LABELS_FILE,
    TRAIN,
    list_images,
    lookalike_key,
    part_kind,
)
from sopdeploy.photos.label_tools import is_of_via, rename
from sopdeploy.photos.table import read_rows

MAX_COLUMNS = 4  # of one table that are tried
# Tables that are searched, and bytes of each
MAX_TABLES = 20
MAX_SEARCHED = 2**24
SPREADSHEETS = (".numbers", ".ods", ".xls", ".xlsx")  # which nothing here reads
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml")


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
                f"{file}: not read; save it as {LABELS_FILE} with the columns file,classes, or rename "
                "it if the folders are the classes"
            )
    if not any(file.suffix.lower() in TABLE_SUFFIXES for file in files):
        return None
    images, _other_files = list_images(root)
    tops = {os.fsdecode(path).partition("/")[0] for path in images if b"/" in path}
    if sum(not part_kind(top) for top in tops) > 1:
        return None
    columns_of = defaultdict[Path, list[str]](list)
    for table, column in find_listing_tables(images, files):
        columns_of[table].append(column)
    tables = (table for table, columns in columns_of.items() if columns == [""])
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
    # Not `Path.is_file`, which raises for a pattern that is longer than a name can be.
    return (table, column) if os.path.isfile(table) else None  # noqa: PTH113


def _labels_all_images(root: Path, table: Path, images: list[bytes]) -> bool:
    """Tell whether *table* lists the *images* in *root* as `find_table` demands."""
    try:
        rows = read_rows(table, images, root)
    except DataError:
        return False

    in_train = [path for path in images if path.rpartition(b"/")[0] == os.fsencode(TRAIN)]
    lists_all = {row.path for row in rows} >= {*(in_train or images)}
    num_labelled = sum(row.classes is not None for row in rows)
    return lists_all and 2 * num_labelled > len(rows)


def find_listing_tables(
    images: Sequence[bytes], files: Iterable[Path]
) -> Iterator[tuple[Path, str]]:
    """Yield those of *files* that list the *images*, and the columns that may be their classes.

    Such a file contains the names of at least half of a sample of the images, with or without
    suffix. A single image is no sample: any text may have its name. The column is "" if it has a
    usual name.
    """
    names = _sample_names(images)
    if len(names) < 2:
        return

    tables = (file for file in files if file.name != LABELS_FILE)
    for table, text in _read_texts(tables):
        if 2 * sum(_is_named(name, text) for name in names) >= len(names):
            for column in _class_columns(table, text, names):
                yield table, column


def _sample_names(images: Sequence[bytes]) -> list[PurePosixPath]:
    """Return the paths of `MAX_SAMPLED` of the *images*, spread over them."""
    sample = images[:: -(-len(images) // MAX_SAMPLED)] if images else []
    return [PurePosixPath(os.fsdecode(path)) for path in sample]


def _read_texts(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the first `MAX_TABLES` of *files* with one of `TABLE_SUFFIXES`, and the beginnings of their texts."""
    chosen = (
        file for file in files if file.suffix.lower() in TABLE_SUFFIXES and file.is_file()
    )
    for file in islice(chosen, MAX_TABLES):
        with suppress(OSError), file.open("rb") as opened:
            text = opened.read(MAX_SEARCHED).decode("utf-8", "replace")
            yield file, text


def _class_columns(table: Path, text: str, names: Sequence[PurePosixPath]) -> list[str]:
    """Return the headings of the CSV file *table* above what may be classes, or "" for a usual heading.

    "" also stands for all columns together, if each is a class with 1 and 0. *names* are those of
    images.
    """
    if table.suffix.lower() not in SEPARATED or is_of_via(text):
        return [""]
    try:
        start = start_csv(text.removeprefix("\ufeff"))
        reader = csv.reader(io.StringIO(start.text, newline=""), delimiter=start.separator)
        headings = [heading.strip() for heading in next(reader, [])]
        rows = [row for row in reader if len(row) == len(headings)]
    except csv.Error:
        return [""]

    known = rename([lookalike_key(heading) for heading in headings])
    if "classes" in known or len(headings) <= 2:
        return [""]
    stems = {one for name in names for one in (name.name, name.stem)}
    columns = dict[str, list[str]]()  # those without names of images
    for position, heading in enumerate(headings):
        values = [row[position].strip() for row in rows]
        if stems.isdisjoint(PurePosixPath(value).name for value in values):
            columns[heading] = values
    found = [heading for heading, values in columns.items() if _may_be_classes(values)]

    # Columns with 1 and 0 may be the classes themselves. They are, if each image has exactly one, or
    # the table is called by them, as that of Roboflow.
    usual = {heading for heading, name in zip(headings, known, strict=True) if name in COLUMNS}
    indicators = [values for heading, values in columns.items() if heading not in usual]
    if len(indicators) > 1 and all({*values} <= {"0", "1"} for values in indicators):
        are_single = all(row.count("1") == 1 for row in zip(*indicators, strict=True))
        if are_single or table.stem.strip("_").lower() == "classes":
            return [""]
        if len(found) > 1:
            return ["", *found[:MAX_COLUMNS]]
    return found[:MAX_COLUMNS] or [""]


def _may_be_classes(values: Sequence[str]) -> bool:
    """Tell whether the *values* of a column repeat: there are two or more, with three rows or more per value."""
    count = len({*values})
    are_measured = any(re.fullmatch(r"-?\d*\.\d+", value) for value in values)
    return 2 <= count <= len(values) / 3 and not are_measured


def _is_named(image: PurePosixPath, text: str) -> bool:
    """Tell whether *text* contains the name of *image*, or its stem of four characters or more, as a word.

    A shorter stem must be the first cell of a line.
    """
    first_cell = rf'^"?{re.escape(image.stem)}"?[{CSV_SEPARATORS}]'
    if image.stem in text and re.search(first_cell, text, re.MULTILINE):
        return True
    names = [image.name, image.stem] if len(image.stem) > 3 else [image.name]
    return any(_is_word(name, text) for name in names)


def _is_word(name: str, text: str) -> bool:
    """Tell whether *text* contains *name*, and neither a letter nor a digit beside it."""
    return name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
