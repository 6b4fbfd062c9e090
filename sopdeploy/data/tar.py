"""Tar archives as one folder of files, read in place without unpacking.

Each archive has an index of its images and tables (`labels.csv`), so reading a file takes one seek.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.folder_store import (
    LABELS_FILE,
    is_hidden,
    is_image,
    lists_images,
    read_label_file,
)
from sopdeploy.data.parts import part_kind
from sopdeploy.errors import DataError

TAR = ".tar"
AFTER_SLASH = b"0"  # the byte after `/`: upper bound of the names inside a folder
TABLE = os.fsencode(LABELS_FILE)


class Members(NamedTuple):
    """Files in archives: `names` (N,) bytes; `ranges` (N, 3) int64: number of the archive, offset, size."""

    names: NDArray[np.bytes_]
    ranges: NDArray[np.int64]

    def select(self, which: NDArray[Any]) -> "Members":
        """Keep the files at the indices, or of the mask, *which*."""
        return Members(self.names[which], self.ranges[which])


def is_tar(path: Path) -> bool:
    """Check whether the name of *path* is that of an uncompressed tar file."""
    return path.name.lower().endswith(TAR)


def list_members(path: Path) -> Members:
    """List the images and tables of the tar file at *path*; raises `DataError` if it is damaged or no tar."""
    try:
        with path.open("rb") as file:
            entries = list(scan(file, path.stat().st_size))
    except (DataError, tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: damaged or not a tar file ({error}); copy or unpack it again") from error
    names = np.asarray([name for name, *_ in entries], dtype=np.bytes_)
    ranges = np.asarray([(0, offset, size) for _, offset, size in entries], dtype=np.int64)
    return Members(names, ranges.reshape(-1, 3))


def scan(file: IO[bytes], end: int, prefix: str = "") -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, size) of the images and tables of the archive at the position of *file*.

    A later member replaces an earlier one of the same name. An archive inside the archive is treated as a
    folder of its name, as in ImageNet's official file.
    """
    ranges: dict[str, tuple[int, int]] = {}
    archive: Any  # its list of members is not part of the typed interface
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep all members in memory
            if member.isreg() and member.offset_data + member.size > end:
                raise DataError(f"{member.name} is truncated; copy the archive again")
            name = _visible_name(prefix + member.name)
            if name is None:
                continue
            if name.endswith(TAR) and member.isreg() and not prefix:
                file.seek(member.offset_data)
                yield from scan(file, member.offset_data + member.size, name.removesuffix(TAR) + "/")
            elif not is_image(base := name.rpartition("/")[2]) and base != LABELS_FILE:
                continue
            elif member.islnk() and (target := _visible_name(prefix + member.linkname)) in ranges:
                ranges[name] = ranges[target]
            elif member.isreg() and member.sparse is None:
                ranges[name] = (member.offset_data, member.size)
    for name, (offset, size) in ranges.items():
        yield os.fsencode(name), offset, size


def _visible_name(name: str) -> str | None:
    """Remove `.` and empty parts from *name*; None if a part is hidden (`is_hidden`) or `..`."""
    parts = [part for part in PurePosixPath(name).parts if part not in {"/", "."}]
    if not parts or any(map(is_hidden, parts)):
        return None
    return "/".join(parts)


@dataclass(frozen=True, slots=True)
class TarStore:
    """Images of several archives below the folder `prefix`.

    `images` are sorted by name. `tables` are the label tables of all folders. Each read opens its archive, so
    that processes share no position.
    """

    root: Path
    archives: tuple[Path, ...]
    images: Members
    tables: Members
    prefix: bytes = b""

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted."""
        names: list[str] = []
        position, end = self._range(self.prefix)
        while position < end:
            head, slash, _ = bytes(self.images.names[position])[len(self.prefix) :].partition(b"/")
            if slash:
                names.append(os.fsdecode(head))
                position = self._range(self.prefix + head + slash)[1]
            else:
                position += 1
        return sorted(names)

    def open_folder(self, folder: str) -> "TarStore":
        """Open a subfolder as a store."""
        return replace(self, root=self.root / folder, prefix=self.prefix + os.fsencode(folder) + b"/")

    def list_files(self, folder: str) -> tuple[list[bytes], list[str]]:
        """List the images below a subfolder, relative to the store, or in the whole store for "".

        The second list, other files, is empty, since the index has only images and tables.
        """
        first, last = self._range(self.prefix + (os.fsencode(folder) + b"/" if folder else b""))
        return [bytes(name)[len(self.prefix) :] for name in self.images.names[first:last]], []

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`."""
        return self._read(self._find(name))

    def has_file(self, name: str) -> bool:
        """Check whether the store contains the file *name*."""
        try:
            self._find(os.fsencode(name))
        except FileNotFoundError:
            return False
        return True

    def label_tables(self) -> list[tuple[Path, bytes]]:
        """Read the `labels.csv` next to the archives and those in the store's folder: path and content."""
        tables = read_label_file(self.root)
        for name, where in zip(*self.tables, strict=True):
            if name == self.prefix + TABLE:
                tables.append((self.archives[where[0]] / os.fsdecode(name), self._read(where)))
        return tables

    def _find(self, name: bytes) -> NDArray[np.int64]:
        names, wanted = self.images.names, self.prefix + name
        position = int(np.searchsorted(names, wanted))
        if position == len(names) or names[position] != wanted:
            raise FileNotFoundError(2, "No such file in the archive", wanted)
        where: NDArray[np.int64] = self.images.ranges[position]
        return where

    def _read(self, where: NDArray[np.int64]) -> bytes:
        archive, offset, size = where.tolist()
        with self.archives[archive].open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size) or b""

    def _range(self, prefix: bytes) -> tuple[int, int]:
        """Find the range of the names in the folder *prefix* (ends with a slash)."""
        names = self.images.names
        if not prefix:
            return 0, len(names)
        first, last = np.searchsorted(names, [prefix, prefix[:-1] + AFTER_SLASH])
        return int(first), int(last)

    def unwrap(self) -> "TarStore":
        """Descend into folders that contain all files, except a part such as train and the only class."""
        store, folders = self, self.folders()
        while len(folders) == 1 and not part_kind(folders[0]) and not store.label_tables():
            inside = replace(store.open_folder(folders[0]), root=self.root)
            has_files = any(b"/" not in name for name in inside.list_files("")[0])
            if has_files and not inside.label_tables():
                break
            store, folders = inside, inside.folders()
        return store


def open_tars(root: Path, paths: Sequence[Path]) -> TarStore:
    """Open the tar files *paths* as one folder, named *root* in error messages.

    An archive with images at its top level, or named like a part (train, val), becomes a folder of its name.
    If a `labels.csv` lists the images, next to the archives or at the top level of one, only archives that
    are named like a part and have no table become folders. A single folder that contains all files is
    skipped. Raises `DataError` if an archive is unreadable or two archives contain the same file.
    """
    lists = [list_members(path) for path in paths]
    has_tables = [TABLE in members.names.tolist() for members in lists]
    has_table = any(has_tables) or any(lists_images(content) for _, content in read_label_file(root))
    for number, (path, members, has_own_table) in enumerate(zip(paths, lists, has_tables, strict=True)):
        members.ranges[:, 0] = number
        name = path.name[: -len(TAR)]
        folder = os.fsencode(name) + b"/"
        is_class = not has_table and bool((np.char.find(members.names, b"/") < 0).any())
        is_part = bool(part_kind(name)) and not has_own_table
        if (is_class or is_part) and not np.char.startswith(members.names, folder).all():
            lists[number] = members._replace(names=np.char.add(folder, members.names))
    every = Members(*(np.concatenate(arrays) for arrays in zip(*lists, strict=True)))
    every = every.select(np.argsort(every.names, kind="stable"))
    is_table = (every.names == TABLE) | np.char.endswith(every.names, b"/" + TABLE)
    images = every.select(~is_table)
    duplicates = np.flatnonzero(images.names[1:] == images.names[:-1])
    if len(duplicates):
        first, second = (paths[images.ranges[duplicates[0] + step, 0]] for step in (0, 1))
        name = bytes(images.names[duplicates[0]]).decode("utf-8", "replace")
        raise DataError(f"{name}: is both in {first} and in {second}; remove one")
    return TarStore(root, tuple(paths), images, every.select(is_table)).unwrap()
