"""What a folder of images is. The rules in `RULES` are tried in their order; nothing else decides.

| what is there | what it is |
|---|---|
| the files of a data set of a library | its official layout (`libraries`) |
| the table that the user names | that table (`table`) |
| `label-config.xml`, and nothing is named | predictions of a server: refused |
| `labels.csv` | that table |
| one folder with a name such as `images` or `dataset` | what that folder is |
| `train/` with folders or `labels.csv`, or all parts with the table that the user names | parts |
| another CSV file that lists all images, and no class folders | that table |
| folders | class folders, perhaps with doubts (`questions`) |

Names and depths of folders decide. Images are not read, and CSV files only to find the last table.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Literal

from sopdeploy.data.folders.cells import is_table
from sopdeploy.data.folders.libraries import detect_kind
from sopdeploy.data.folders.questions import doubt_folders, doubt_parts
from sopdeploy.data.folders.table import UNSPLIT
from sopdeploy.data.folders.table_search import find_listing_table, list_needed
from sopdeploy.data.photos.contents import Contents, list_contents
from sopdeploy.data.photos.files import list_subfolders
from sopdeploy.data.photos.kept import check_is_labelled
from sopdeploy.data.photos.parts import (
    FOLDERS,
    LABELS_FILE,
    find_parts,
    is_general,
    part_folder,
    part_kind,
)
from sopdeploy.data.photos.spelling import normalize
from sopdeploy.errors import DataError

Kind = Literal["official", "table", "part tables", "classes"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the folder of *contents* is, and what of it is read.

    Attributes:
        parts: What each part holds, the training part first; `UNSPLIT` without parts.
        classes_from: How the user says that classes are told, "" if nobody says it.
        table: The table with the classes; of "part tables", its name in each part.
        column: The heading above its classes, "" for a usual one.
        unused: Folders beside the parts.
        doubts: Why these may not be the classes, with the folders; a question to the user, if there
            are some.
        official: The data set of a library.
    """

    kind: Kind
    contents: Contents
    parts: Mapping[str, Contents] = field(default_factory=dict)
    classes_from: str = ""
    table: Path = Path()
    column: str = ""
    unused: tuple[str, ...] = ()
    doubts: Mapping[str, list[str]] = field(default_factory=dict)
    official: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """What is known before a folder is looked at: settings of the user, and *known* classes of a network."""

    classes_from: str = ""
    leave_out: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()


def find_layout(
    root: Path,
    classes_from: str = "",
    leave_out: Collection[str] = (),
    known: Collection[str] = (),
) -> Layout:
    """Find what *root* is, for a network with the *known* classes, or for a new one.

    Raises `DataError` if it cannot be listed, and if it is certain that it has no labels.
    """
    said = Said(classes_from, tuple(leave_out), frozenset(map(normalize, known)))
    return _apply_rules(list_contents(root, leave_out), said)


def named_table(root: Path, classes_from: str) -> tuple[Path, str] | None:
    """Return the table in *root* that the setting *classes_from* names, and its column; None for others."""
    name, _, column = classes_from.partition(":")
    # Not `Path.is_file`, which raises for a pattern that is longer than a name can be.
    if not name or not os.path.isfile(root / name):  # noqa: PTH113
        return None
    if not is_table(name):
        raise DataError(
            f"{root / name}: is not a CSV file; convert it with datumaro (`datum convert`) or FiftyOne "
            "(`fiftyone convert`)"
        )
    return root / name, column


def _apply_rules(contents: Contents, said: Said) -> Layout:
    layouts = (rule(contents, said) for rule in RULES)
    return next(layout for layout in layouts if layout is not None)


def _as_official(contents: Contents, said: Said) -> Layout | None:
    kind = None if said.classes_from else detect_kind(contents.root)
    return None if kind is None else Layout("official", contents, official=kind)


def _as_named_table(contents: Contents, said: Said) -> Layout | None:
    named = named_table(contents.root, said.classes_from)
    if named is None:
        return None
    return Layout(
        "table", contents, classes_from=said.classes_from, table=named[0], column=named[1]
    )


def _refuse_predictions(contents: Contents, said: Said) -> None:
    if not (said.classes_from or said.known):
        check_is_labelled(contents.root)


def _as_labels_csv(contents: Contents, said: Said) -> Layout | None:
    table = contents.root / LABELS_FILE
    # A link that leads nowhere is an error of the table; a folder may be a class.
    if said.classes_from or not os.path.lexists(table) or table.is_dir():
        return None
    return Layout("table", contents, table=table)


def _as_folder_inside(contents: Contents, said: Said) -> Layout | None:
    """Look into the only folder with images if its name is not a class."""
    if said.classes_from or contents.num_beside or len(contents.tops) != 1:
        return None
    (top,) = contents.tops
    is_inside = is_general(top) or (said.known and normalize(top) not in said.known)
    if not is_inside or any(map(is_table, contents.files)):
        return None
    inner = contents.root / top
    return _apply_rules(contents.within(inner), said) if list_subfolders(inner) else None


def _as_parts(contents: Contents, said: Said) -> Layout | None:
    # If each folder is a class of the network, none is a part, even if it is called val.
    root = contents.root
    found = find_parts(root, contents.folders)
    if {*map(normalize, contents.tops)} <= said.known:
        return None
    # If the user says that folders are classes, parts are some only if nothing else is there.
    if said.classes_from == FOLDERS and not (
        found.train and all(map(part_kind, contents.tops))
    ):
        return None
    names = (found.train, *found.held_out) if found.train else found.held_out
    if not names or (not found.train and found.others):
        return None
    if not found.train and not said.known:
        raise DataError(
            f"{root}: holds {names[0]} but no train; put the training images there, or say that the "
            f"folders are classes: sopdeploy train --data {quote(str(root))} --set data.classes_from=folders"
        )

    # Each part can have a table of the same name.
    parts = {name: contents.within(part_folder(root, name)) for name in names}
    unused = tuple(name for name in found.others if name in contents.tops)
    training = parts[names[0]]
    named = named_table(training.root, said.classes_from or LABELS_FILE)
    if named is not None:
        return Layout(
            "part tables",
            contents,
            parts,
            said.classes_from,
            Path(named[0].name),
            named[1],
            unused,
        )
    if said.classes_from in ("", FOLDERS) and not training.folders:
        return None

    doubts = {} if said.known or said.classes_from else doubt_parts(parts, unused)
    return Layout("classes", contents, parts, said.classes_from, unused=unused, doubts=doubts)


def _as_listing_table(contents: Contents, said: Said) -> Layout | None:
    if said.classes_from:
        return None
    table = find_listing_table(contents)
    if table is None:
        return None
    _, others = list_needed(contents)
    return Layout("table", contents, table=table[0], column=table[1], unused=tuple(others))


def _as_class_folders(contents: Contents, said: Said) -> Layout:
    doubts = {} if said.known or said.classes_from else doubt_folders(contents)
    return Layout("classes", contents, {UNSPLIT: contents}, said.classes_from, doubts=doubts)


RULES: tuple[Callable[[Contents, Said], Layout | None], ...] = (
    _as_official,
    _as_named_table,
    _refuse_predictions,
    _as_labels_csv,
    _as_folder_inside,
    _as_parts,
    _as_listing_table,
    _as_class_folders,
)
