"""Folders of files, and the table `labels.csv` in them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sopdeploy.errors import DataError
from sopdeploy.files import open_regular
from sopdeploy.images.limits import SUFFIXES

# Written by macOS, Synology, QNAP, Windows and file systems; they hold copies and thumbnails.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
LABELS_FILE = "labels.csv"  # lists images with any number of classes each; `label_table` reads it
REQUIRED = ("file", "classes")  # its columns
Log = Callable[[str], None]


def ignore(_line: str) -> None:
    """Discard a log message."""


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder on disk, without its hidden files; `open_folder` opens a subfolder as a store."""

    root: Path
    open_folder: Callable[[str], Any]

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted; raises `DataError`."""
        return [entry.name for entry in list_folder(self.root) if _is_folder(entry)]

    def list_files(self, folder: str) -> tuple[list[bytes], list[str]]:
        """List the images below *folder*, sorted, and the other files below it, relative to the store.

        Raises `DataError` for a folder that cannot be listed.
        """
        images, others = [], []
        for path in walk(self.root / folder):
            inside = path.relative_to(self.root)
            if is_image(path.name):
                images.append(os.fsencode(inside))
            else:
                others.append(str(inside))
        return sorted(images), others

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`, also for a FIFO, socket or device."""
        with open_regular(self.root / os.fsdecode(name)) as file:
            return file.read()

    def has_file(self, name: str) -> bool:
        """Check whether the store contains the file *name*."""
        return (self.root / name).is_file()

    def label_tables(self) -> list[tuple[Path, bytes]]:
        """Read the `labels.csv` of the folder, if any: its path and content; raises `DataError`."""
        return read_label_file(self.root)


def read_label_file(folder: Path) -> list[tuple[Path, bytes]]:
    """Read the `labels.csv` of *folder*, if any: its path and content; raises `DataError`."""
    path = folder / LABELS_FILE
    if not path.is_file():
        return []
    try:
        return [(path, path.read_bytes())]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def lists_images(table: bytes) -> bool:
    """Check whether the table lists images: its first line names a column in `REQUIRED`."""
    header = table[:1000].partition(b"\n")[0].decode("utf-8-sig", "replace")
    columns = header.replace(";", ",").replace("\t", ",").split(",")
    return bool({column.strip(' "\r') for column in columns} & set(REQUIRED))


def walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below *folder*, sorted by name in each folder, without hidden files and folders.

    Links to folders are followed, except a link to a folder that contains the link. *above* are the real
    paths of the folders that contain *folder*. Raises `DataError` for a folder that cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    above |= {real, *map(str, Path(real).parents)}
    for entry in list_folder(folder):
        path = folder / entry.name
        if _is_folder(entry):
            yield from walk(path, above)
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
