"""Tar archives as one folder of files, read in place without unpacking.

Each archive has an index of its images and tables (`labels.csv`), so reading a file takes one seek. With a
cache folder, the index is stored under a name that changes with the archive.
"""

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.folder_store import (
    LABELS_FILE,
    OpenOptions,
    is_hidden,
    is_image,
    lists_images,
    read_label_file,
)
from sopdeploy.data.parts import part_kind
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write, expand_user, open_regular, writing

TAR = ".tar"
DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".tar.xz": lzma.open,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
}
CHUNK = 1 << 20  # bytes
AFTER_SLASH = b"0"  # the byte after `/`: upper bound of the names inside a folder
TABLE = os.fsencode(LABELS_FILE)


class Members(NamedTuple):
    """Files in archives: `names` (N,) bytes; `ranges` (N, 3) int64: number of the archive, offset, size."""

    names: NDArray[np.bytes_]
    ranges: NDArray[np.int64]

    def select(self, which: NDArray[Any]) -> "Members":
        """Keep the files at the indices, or of the mask, *which*."""
        return Members(self.names[which], self.ranges[which])


def archive_suffix(path: Path) -> str:
    """Get the suffix of a tar file, compressed or not; empty if *path* has another suffix."""
    name = path.name.lower()
    return next((suffix for suffix in (TAR, *DECOMPRESSORS) if name.endswith(suffix)), "")


def cache_folder(folder: Path | None) -> Path:
    """Create the cache *folder*, by default a private one among the temporary files.

    Raises `DataError` if it cannot be created, or if other users can write to the default folder.
    """
    path = expand_user(folder) if folder else Path(tempfile.gettempdir()) / f"sopdeploy-{os.getuid()}"
    with writing(path, DataError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    if folder is None and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise DataError(f"{path}: other users can write there; set data.cache to your own folder")
    return path


def fingerprint(path: Path) -> str:
    """Hash the path, size and modification time of a file."""
    status = path.stat()
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def list_members(path: Path, cache: Path | None) -> Members:
    """List the images and tables of the tar file at *path*, or read the list from *cache*.

    Raises `DataError` if the file is damaged or not a tar file.
    """
    if cache is None:
        return _scan_members(path)
    stored = cache / f"{path.name}.{fingerprint(path)}.npz"
    if not stored.is_file():
        members = _scan_members(path)
        with (
            writing(stored, DataError),
            atomic_write(stored, shared=True) as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, allow_pickle=False, **members._asdict())
    with np.load(stored) as arrays:
        return Members(**arrays)


def _scan_members(path: Path) -> Members:
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

    `images` are sorted by name. `paths` are those of the archives as the user names them, `archives` those
    that are read. `tables` are the label tables of all folders. Each read opens its archive, so that
    processes share no position.
    """

    root: Path
    paths: tuple[Path, ...]
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
                tables.append((self.paths[where[0]] / os.fsdecode(name), self._read(where)))
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


def open_tars(root: Path, paths: Sequence[Path], options: OpenOptions) -> TarStore:
    """Open the tar files *paths* as one folder, named *root* in error messages.

    An archive with images at its top level, or named like a part (train, val), becomes a folder of its name.
    If a `labels.csv` lists the images, next to the archives or at the top level of one, only archives that
    are named like a part and have no table become folders. A single folder that contains all files is
    skipped. Raises `DataError` if an archive is unreadable or two archives contain the same file.
    """
    cache = cache_folder(options.cache) if options.cache else None
    archives = tuple(decompress(path, options) for path in paths)
    lists = [list_members(archive, cache) for archive in archives]
    has_tables = [TABLE in members.names.tolist() for members in lists]
    has_table = any(has_tables) or any(lists_images(content) for _, content in read_label_file(root))
    for number, (path, members, has_own_table) in enumerate(zip(paths, lists, has_tables, strict=True)):
        members.ranges[:, 0] = number
        name = path.name[: -len(archive_suffix(path))]
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
    return TarStore(root, tuple(paths), archives, images, every.select(is_table)).unwrap()


def decompress(path: Path, options: OpenOptions) -> Path:
    """Decompress *path* into the cache folder once; returns the path of the tar file to read."""
    suffix = archive_suffix(path)
    if suffix == TAR:
        return path
    folder = cache_folder(options.cache)
    target = folder / f"{path.name[: -len(suffix)]}.{fingerprint(path)}.tar"
    if target.exists():
        return target
    options.log(f"decompressing {path} once to {target}" + ("" if options.cache else "; or set data.cache"))
    try:
        with (
            atomic_write(target, shared=True) as partial,
            open_regular(path) as compressed,
            DECOMPRESSORS[suffix](compressed) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, CHUNK)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be decompressed to {folder} ({error}); copy it again, or set data.cache to a "
            "folder with enough space"
        ) from error
    return target
