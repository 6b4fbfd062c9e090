"""Listing of folders with images, without hidden files and the folders of file systems."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sopdeploy.errors import DataError
from sopdeploy.files import expand_user
from sopdeploy.images.limits import SUFFIXES

# Written by macOS, Synology, QNAP, Windows and file systems; they hold copies and thumbnails.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
Log = Callable[[str], None]


def ignore(_line: str) -> None:
    """Discard a log message."""


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

    All paths are relative to *root*. Raises `DataError` for a folder that cannot be listed.
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
    ancestors |= {real, *map(str, Path(real).parents)}
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
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether *entry* is a folder or a link to one; a link that leads to itself is not."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))  # noqa: PTH112


def is_hidden(name: str) -> bool:
    """Check whether programs ignore the file or folder *name*: hidden, or written by a file system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Check whether the file *name* is visible and has an image suffix."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)
