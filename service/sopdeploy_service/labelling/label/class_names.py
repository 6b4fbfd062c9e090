"""The classes that a folder of photographs has, and which new names a class can get."""

from collections.abc import Collection
from pathlib import Path

from sopdeploy.errors import ConfigError
from sopdeploy.names import can_be_typed, class_problem
from sopdeploy.photos.files import (
    is_hidden,
    list_subfolders,
    lookalike_key,
    normalize,
    part_kind,
)

MAX_CLASS_BYTES = 100  # of a name in UTF-8
NOT_IN_NAMES = '/\\:*?"<>|'  # of folders on some systems


def class_folders(parent: Path) -> dict[str, Path]:
    """Return the folders of classes in *parent*, which may not exist, by the names of the classes."""
    names = list_subfolders(parent) if parent.is_dir() else ()
    return {normalize(name): parent / name for name in names}


def check_class_name(name: str, classes: list[str], folders: Collection[str] = ()) -> str:
    """Return the name of the class *name*; raise `ConfigError` unless it can name a class.

    A new name must not be easily confused with one of *classes*. The names of the existing
    *folders* may have any length and characters.
    """
    name = normalize(name)
    if name not in classes:  # names that exist stay as they are
        name = name.strip()

    problem = _find_name_problem(name, classes, folders)
    if problem:
        raise ConfigError(f"class {name!r:.80}: {problem}")
    return name


def _find_name_problem(name: str, classes: list[str], folders: Collection[str]) -> str:
    """Say why *name* cannot name a class, as `check_class_name` does; empty if it can."""
    # A name that no folder has yet must fit into one, and be typed.
    if name not in folders:
        if not 1 <= len(name.encode("utf-8", "replace")) <= MAX_CLASS_BYTES:
            return f"write 1 to {MAX_CLASS_BYTES} bytes"
        if not all(map(can_be_typed, name)) or set(name) & set(NOT_IN_NAMES):
            return f"leave out control and invisible characters and {' '.join(NOT_IN_NAMES)}"

    if problem := class_problem(name):  # also if the folder is there: `train` would refuse it
        return problem

    # Refuse what `train` would not take for a class.
    if is_hidden(name) or name.endswith("."):
        return "the folder would be hidden; do not begin or end with a dot"
    if part_kind(name):
        return "`train` takes such a folder for a part of the data; choose another name"

    # Refuse the same name in other letters.
    spellings = [other for other in classes if lookalike_key(other) == lookalike_key(name)]
    if spellings and name not in spellings:
        return f"use the class {spellings[0]!r}, which has the same name in other letters"
    return ""
