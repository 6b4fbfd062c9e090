"""Listing of folders with images, without hidden files and the folders of file systems."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sopdeploy.errors import DataError, shorten
from sopdeploy.files import expand_user
from sopdeploy.photos.names import HELD_OUT, TRAINING, is_hidden, is_image, part_kind

Log = Callable[[str], None]


class Parts(NamedTuple):
    """Names of the subfolders of a data set.

    `train` holds the training images and is empty if there is no such folder. `held_out` is sorted as
    `HELD_OUT` is. `others` are all other subfolders.
    """

    train: str
    held_out: tuple[str, ...]
    others: tuple[str, ...]


def data_folder(path: Path) -> Path:
    """Replace `~` at the beginning of *path*; raise `DataError` if it is not a folder."""
    folder = expand_user(path)
    if not folder.is_dir():
        problem = "not a folder; unpack archives first, and" if folder.exists() else "no such folder;"
        raise DataError(f"{folder}: {problem} give a folder with one subfolder of images per class")
    return folder


def list_subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of *folder*, sorted; raises `DataError`."""
    return [entry.name for entry in list_folder(folder) if _is_folder(entry)]


def list_images(root: Path, folder: str = "") -> tuple[list[bytes], list[str]]:
    """List the images below the subfolder *folder* of *root*, sorted, and the other files below it.

    All paths are relative to *root*. Those of images are bytes, as `ImageFiles` has them in an array; the
    others are text for messages. Raises `DataError` for a folder that cannot be listed.
    """
    images, others = [], []
    for path in walk(root / folder):
        relative = path.relative_to(root)
        if is_image(path.name):
            images.append(os.fsencode(relative))
        else:
            others.append(str(relative))
    return sorted(images), others


def walk(folder: Path, ancestors: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below *folder*, sorted by name in each folder, without hidden files and folders.

    Links to folders are followed, except a link to a folder that contains the link. *ancestors* are the real
    paths of the folders that contain *folder*. Raises `DataError` for a folder that cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    ancestors |= {real, *map(str, Path(real).parents)}  # also those above the first folder
    for entry in list_folder(folder):
        path = folder / entry.name
        if _is_folder(entry):
            yield from walk(path, ancestors)
        else:
            yield path


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List the content of *folder*, sorted by name, without what is hidden; raises `DataError`."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    for entry in visible:
        try:
            os.fsencode(entry.name).decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{folder}: the name {entry.name!r} is not UTF-8; rename it") from None
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether *entry* is a folder or a link to one; a link that leads to itself is not."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))  # noqa: PTH112


def find_parts(root: Path) -> Parts:
    """Find the parts of the data set in *root*; raises `DataError` for two folders of training images."""
    names = list_subfolders(root)
    kinds = {name: part_kind(name) for name in names}
    candidates = [name for name in names if kinds[name] in TRAINING]
    if not all(kinds.values()):  # beside others, `train` may be a class; as a part it contains folders
        candidates = [name for name in candidates if list_subfolders(root / name)]
    if len(candidates) > 1:
        raise DataError(f"{root}: {shorten(candidates)} may all hold the training images; rename all but one")
    held_out = [name for name in names if kinds[name] in HELD_OUT]
    held_out.sort(key=lambda name: HELD_OUT.index(kinds[name]))
    train = candidates[0] if candidates else ""
    others = tuple(name for name in names if name not in (train, *held_out))
    return Parts(train, tuple(held_out), others)


def part_folder(root: Path, name: str) -> Path:
    """Return the folder of the part *name* in *root*; for `seg_train/seg_train/`, the inner folder."""
    folder = root / name
    while len(inner := list_subfolders(folder)) == 1 and part_kind(inner[0]) == part_kind(name):
        folder /= inner[0]
    return folder
