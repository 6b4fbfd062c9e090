"""CSV files beside images: whether one lists them, and which of its columns may be the classes."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sopdeploy.data.folders.cells import (
    GROUP,
    MAX_SAMPLED,
    SPLIT,
    is_table,
    read_table_text,
    rename,
    start_csv,
)
from sopdeploy.data.photos.contents import Contents
from sopdeploy.data.photos.listed_images import ListedImages, find_by_name
from sopdeploy.data.photos.parts import LABELS_FILE, TRAINING, is_general, part_kind
from sopdeploy.data.photos.spelling import lookalike_key
from sopdeploy.errors import DataError

PER_CLASS = 3  # rows that a class has on average
NAMES_CLASSES = re.compile(
    "class|label|categor|target|species|breed", re.IGNORECASE
)  # a heading


class TableOfImages(NamedTuple):
    """A CSV file that lists images: whether all, and the headings of columns that may be the classes.

    "" stands for a usual heading, or for all columns together if each is a class with 1 and 0. The heading
    of one of them `names_classes`. A table that `repeats_folders` has a column with one value for each folder
    of the images.
    """

    path: Path
    lists_all: bool
    columns: list[str]
    is_certain: bool
    names_classes: bool = False
    repeats_folders: bool = False


def find_listing_table(contents: Contents) -> tuple[Path, str] | None:
    """Return the CSV file that lists all images, and the heading of its classes; None if it is not certain.

    Of a folder with a training part, it must list all images of this part. Folders that may be
    classes, several such files, and several columns that may be the classes are not certain.
    """
    needed, _ = list_needed(contents)
    if not any(map(is_table, contents.files)) or _may_be_classes(contents):
        return None
    tables = [*list_tables(contents.root, needed)]
    if len(tables) == 1 and tables[0].lists_all and tables[0].is_certain:
        return tables[0].path, tables[0].columns[0]
    return None


def list_needed(contents: Contents) -> tuple[list[bytes], list[str]]:
    """List the images that a table must list: of the training part, if there is one; and the other folders."""
    training = [top for top in contents.tops if part_kind(top) in TRAINING]
    if len(training) != 1 or not all(map(part_kind, contents.tops)):
        return contents.images, []
    start = os.fsencode(f"{training[0]}/")
    needed = [path for path in contents.images if path.startswith(start)]
    return needed, [top for top in contents.tops if top != training[0]]


def _may_be_classes(contents: Contents) -> bool:
    """Tell whether two folders that hold images may be classes, or if one in a part may be one."""
    names = {path.rpartition(b"/")[0].rpartition(b"/")[2] for path in contents.images} - {b""}
    words = [os.fsdecode(name) for name in names]
    return sum(not (part_kind(word) or is_general(word)) for word in words) > 1


def list_tables(root: Path, images: list[bytes]) -> Iterator[TableOfImages]:
    """Yield the CSV files in *root* that list *images*, paths in it."""
    listed = ListedImages(root, images)
    for path in sorted(root.iterdir()):
        if not is_table(path.name) or path.name == LABELS_FILE or not path.is_file():
            continue
        try:
            start = start_csv(read_table_text(path))
            lines = start.text.splitlines()
            reader = csv.reader(lines, delimiter=start.separator, skipinitialspace=True)
            heading, *rows = reader
        except (DataError, csv.Error, ValueError):
            continue
        rows = [[cell.strip() for cell in row] for row in rows if len(row) == len(heading)]
        if table := _look_at(path, heading, rows, listed):
            yield table


def _look_at(
    path: Path, heading: list[str], rows: list[list[str]], images: ListedImages
) -> TableOfImages | None:
    """Find the columns of images and of classes in *rows* below *heading*; None without them."""
    columns = dict(zip(map(str.strip, heading), zip(*rows, strict=True), strict=False))
    candidates = [name for name, cells in columns.items() if _names_images(cells, images)]
    if not candidates:
        return None
    # A class called 1 may also be the name of an image.
    file = max(candidates, key=lambda name: len({*columns[name]}))
    found = [find_by_name(cell, images.path_of_name) for cell in columns[file]]
    lists_all = {*found} >= {*images.path_in_folder.values()}
    folders = [(path or b"").rpartition(b"/")[0] for path in found]

    # The column with a usual name, the only other one, all with 1 and 0, or those with few values
    others = {name: {*cells} for name, cells in columns.items() if name != file}
    is_usual = "classes" in rename([lookalike_key(name) for name in heading])
    table = TableOfImages(
        path,
        lists_all,
        [""],
        is_certain=True,
        names_classes=is_usual or any(NAMES_CLASSES.search(name) for name in others),
        repeats_folders=any(_is_one_to_one(folders, columns[name]) for name in others),
    )
    if is_usual:
        return table
    if len(columns) == 2:
        return table._replace(columns=[*others])
    if len(others) > 1 and all(values <= {"0", "1"} for values in others.values()):
        return table._replace(is_certain=False)
    few = [
        name
        for name, values in others.items()
        if 2 <= len(values) <= len(rows) / PER_CLASS and name.lower() not in (SPLIT, GROUP)
    ]
    return table._replace(columns=few, is_certain=len(few) == 1) if few else None


def _is_one_to_one(keys: Sequence[object], values: Sequence[object]) -> bool:
    """Tell whether each of *keys* stands beside one of *values* only, and each value beside one key."""
    pairs = {*zip(keys, values, strict=True)}
    return len(pairs) == len({*keys}) == len({*values})


def _names_images(cells: Sequence[str], images: ListedImages) -> bool:
    """Tell whether most of the first *cells* of a column are names of *images*."""
    sampled = cells[:MAX_SAMPLED]
    return 2 * sum(
        find_by_name(cell, images.path_of_name) is not None for cell in sampled
    ) > len(sampled)
