"""Folders of files, the table `labels.csv` in them, and the options for opening data."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sopdeploy.errors import DataError
from sopdeploy.files import open_regular

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABELS_FILE = "labels.csv"  # lists images with any number of classes each; `label_table` reads it
REQUIRED = ("file", "classes")  # its columns
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening data: the cache folder for archives, and a function for log messages."""

    cache: Path | None = None
    log: Log = field(default=lambda _line: None)


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder on disk, without its hidden files; `open_folder` opens a subfolder as a store."""

    root: Path
    open_folder: Callable[[str], Any]

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted; raises `DataError`."""
        try:
            paths = [path for path in self.root.iterdir() if path.is_dir()]
        except OSError as error:
            reason = f"cannot be listed ({error.strerror}); check its permissions"
            raise DataError(f"{self.root}: {reason}") from error
        return sorted(path.name for path in paths if not path.name.startswith("."))

    def list_files(self, folder: str) -> tuple[list[bytes], list[str]]:
        """List the images below *folder*, sorted, and the other files below it, relative to the store.

        Links to folders are followed, except those to a folder that contains them.
        """
        images, others = [], []
        top = str(self.root / folder)
        real_top = Path(os.path.realpath(top))
        above = {top: {str(real_top), *map(str, real_top.parents)}}  # the folders that contain a folder
        for path, folders, files in os.walk(top, followlinks=True):
            real = {name: os.path.realpath(Path(path, name)) for name in folders if not name.startswith(".")}
            folders[:] = [name for name in real if real[name] not in above[path]]
            above |= {str(Path(path, name)): above[path] | {real[name]} for name in folders}
            for name in files:
                inside = Path(path, name).relative_to(self.root)
                if is_image(name):
                    images.append(os.fsencode(inside))
                elif not name.startswith("."):
                    others.append(str(inside))
        return sorted(images), others

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`, also for a FIFO, socket or device."""
        with open_regular(self.root / os.fsdecode(name)) as file:
            return file.read()

    def size(self, name: bytes) -> int:
        """Get the size of a file in bytes; raises `OSError`."""
        return (self.root / os.fsdecode(name)).stat().st_size

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


def is_image(name: str) -> bool:
    """Check whether the file *name* is visible and has an image suffix."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
