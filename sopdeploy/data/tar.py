"""Tar archives as one folder of files, read in place without unpacking.

Each archive has an index of its images and tables (`labels.csv`), so reading a file takes one seek. With a
cache folder, the index is stored under a name that changes with the archive.
"""

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
from sopdeploy.files import atomic_write, expand_user

TAR = ".tar"
DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".tar.xz": lzma.LZMAFile,
    ".tar.gz": gzip.GzipFile,
    ".tgz": gzip.GzipFile,
}
CHUNK = 1 << 20  # bytes
AFTER_SLASH = b"0"  # the byte after `/`: upper bound of the names inside a folder
MAX_KEPT_MEMBERS = 4096  # tarfile would keep all members in memory


def archive_suffix(path: Path) -> str:
    """Get the suffix of a tar file, compressed or not; empty if *path* has another suffix."""
    name = path.name.lower()
    return next((suffix for suffix in (TAR, *DECOMPRESSORS) if name.endswith(suffix)), "")


def cache_folder(folder: Path | None) -> Path:
    """Create the cache *folder*, by default a private one among the temporary files.

    Raises `DataError` if it cannot be created, or if other users can write to the default folder.
    """
    path = expand_user(folder) if folder else Path(tempfile.gettempdir()) / f"sopdeploy-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be created ({error.strerror}); set data.cache to your own folder"
        ) from error
    if folder is None and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise DataError(f"{path}: other users can write there; set data.cache to your own folder")
    return path


@dataclass(frozen=True, slots=True)
class Index:
    """Images and tables of one archive: `names` (N,) bytes, `offsets` and `sizes` (N,) int64 in bytes."""

    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def load_index(path: Path, cache: Path | None) -> Index:
    """Load the index of the tar file at *path* from *cache*, or build and store it.

    Raises `DataError` if the file is damaged or not a tar file.
    """
    if cache is None:
        return _build_index(path)
    stored = cache / f"{path.name}.{fingerprint(path)}.files.npz"
    index = read_index(stored, path.stat().st_size)
    if index is None:
        index = _build_index(path)
        try:
            with atomic_write(stored, shared=True) as partial, partial.open("wb") as file:
                np.savez(file, names=index.names, offsets=index.offsets, sizes=index.sizes)
        except OSError as error:
            raise DataError(
                f"{stored}: cannot be written ({error.strerror}); set data.cache to another folder"
            ) from error
    return index


def fingerprint(path: Path) -> str:
    """Hash the path, size and modification time of a regular file; raises `DataError`."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file; name a tar file")
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_index(path: Path, archive_size: int) -> Index | None:
    """Read a stored index; None if it is missing, damaged or points outside the archive."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            index = Index(names=stored["names"], offsets=stored["offsets"], sizes=stored["sizes"])
    except Exception:  # a damaged file can make numpy raise anything; the index is rebuilt
        return None
    arrays = (index.names, index.offsets, index.sizes)
    if index.names.dtype.kind != "S" or any(array.shape != (len(index.names),) for array in arrays):
        return None
    if any(array.dtype != np.int64 or (array < 0).any() for array in arrays[1:]):
        return None
    return index if (index.offsets + index.sizes <= archive_size).all() else None


def _build_index(path: Path) -> Index:
    try:
        with path.open("rb") as file:
            entries = list(scan(file, path.stat().st_size))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: damaged or not a tar file ({error}); copy or unpack it again") from error
    names, offsets, sizes = zip(*entries, strict=True) if entries else ((), (), ())
    return Index(
        names=np.asarray(names, dtype=np.bytes_),
        offsets=np.asarray(offsets, dtype=np.int64),
        sizes=np.asarray(sizes, dtype=np.int64),
    )


def scan(file: IO[bytes], end: int, prefix: str = "") -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, size) of the images and tables of the archive at the position of *file*.

    A later member replaces an earlier one of the same name. An archive inside the archive is treated as a
    folder of its name, as in ImageNet's official file.
    """
    ranges: dict[str, tuple[int, int]] = {}
    archive: Any  # its list of members is not part of the typed interface
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            if len(archive.members) > MAX_KEPT_MEMBERS:
                archive.members.clear()
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
class Table:
    """A `labels.csv`: its path as if the archive were a folder, the folder that it is in, its content."""

    path: Path
    folder: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class TarStore:
    """Images of several archives below the folder `prefix`; `sources` (N,) are indices into `archives`.

    `names` is sorted. Each read opens its archive, so that processes share no position. `tables` are those of
    all folders.
    """

    root: Path
    archives: tuple[Path, ...]
    names: NDArray[np.bytes_]
    sources: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tables: tuple[Table, ...] = ()
    prefix: bytes = b""

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted."""
        names: list[str] = []
        position, end = self._range(self.prefix)
        while position < end:
            head, slash, _ = bytes(self.names[position])[len(self.prefix) :].partition(b"/")
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
        return [bytes(name)[len(self.prefix) :] for name in self.names[first:last]], []

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`."""
        position = self._find(name)
        with self.archives[self.sources[position]].open("rb", buffering=0) as file:
            file.seek(int(self.offsets[position]))
            return file.read(int(self.sizes[position])) or b""

    def size(self, name: bytes) -> int:
        """Get the size of a file in bytes; raises `OSError`."""
        return int(self.sizes[self._find(name)])

    def has_file(self, name: str) -> bool:
        """Check whether the store contains the file *name*."""
        wanted = self.prefix + os.fsencode(name)
        position = int(np.searchsorted(self.names, wanted))
        return position < len(self.names) and bool(self.names[position] == wanted)

    def label_tables(self) -> list[tuple[Path, bytes]]:
        """Read the `labels.csv` next to the archives and those in the store's folder: path and content."""
        inside = [(table.path, table.content) for table in self.tables if table.folder == self.prefix]
        return [*read_label_file(self.root), *inside]

    def _lists_images(self) -> bool:
        return any(lists_images(content) for _, content in self.label_tables())

    def _find(self, name: bytes) -> int:
        wanted = self.prefix + name
        position = int(np.searchsorted(self.names, wanted))
        if position == len(self.names) or self.names[position] != wanted:
            raise FileNotFoundError(2, "No such file in the archive", wanted)
        return position

    def _range(self, prefix: bytes) -> tuple[int, int]:
        """Find the range of the names in the folder *prefix* (ends with a slash)."""
        if not prefix:
            return 0, len(self.names)
        first, last = np.searchsorted(self.names, [prefix, prefix[:-1] + AFTER_SLASH])
        return int(first), int(last)

    def unwrap(self) -> "TarStore":
        """Descend into folders that contain all files, except a part such as train and the only class."""
        store, folders = self, self.folders()
        while len(folders) == 1 and not part_kind(folders[0]) and not store._lists_images():
            inside = replace(store.open_folder(folders[0]), root=self.root)
            first, last = inside._range(inside.prefix)
            has_files = (np.char.find(inside.names[first:last], b"/", len(inside.prefix)) < 0).any()
            if has_files and not inside._lists_images():
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
    contents = [
        _split_tables(load_index(archive, cache), path, archive)
        for path, archive in zip(paths, archives, strict=True)
    ]
    contents = _as_folders(root, paths, contents)
    indices = [index for index, _ in contents]
    names = np.concatenate([index.names for index in indices])
    sources = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.names) for index in indices])
    by_name = np.argsort(names, kind="stable")
    names, sources = names[by_name], sources[by_name]
    duplicates = np.flatnonzero(names[1:] == names[:-1])
    if len(duplicates):
        first, second = (paths[sources[duplicates[0] + step]] for step in (0, 1))
        name = bytes(names[duplicates[0]]).decode("utf-8", "replace")
        raise DataError(f"{name}: is both in {first} and in {second}; remove one")
    offsets = np.concatenate([index.offsets for index in indices])[by_name]
    sizes = np.concatenate([index.sizes for index in indices])[by_name]
    all_tables = tuple(table for _, tables in contents for table in tables)
    return TarStore(root, archives, names, sources, offsets, sizes, all_tables).unwrap()


def _as_folders(
    root: Path, paths: Sequence[Path], contents: list[tuple[Index, list[Table]]]
) -> list[tuple[Index, list[Table]]]:
    """Put the content of an archive that is a class or a part into a folder of its name (`open_tars`)."""
    listed = [
        any(not table.folder and (len(paths) == 1 or lists_images(table.content)) for table in tables)
        for _, tables in contents
    ]
    has_table = any(listed) or any(lists_images(content) for _, content in read_label_file(root))
    result = []
    for path, (index, tables), has_own_table in zip(paths, contents, listed, strict=True):
        name = path.name[: -len(archive_suffix(path))]
        folder = os.fsencode(name) + b"/"
        is_class = not has_table and bool((np.char.find(index.names, b"/") < 0).any())
        is_part = bool(part_kind(name)) and not has_own_table
        if (is_class or is_part) and not np.char.startswith(index.names, folder).all():
            index = replace(index, names=np.char.add(folder, index.names))
            tables = [replace(table, folder=folder + table.folder) for table in tables]
        result.append((index, tables))
    return result


def _split_tables(index: Index, path: Path, archive: Path) -> tuple[Index, list[Table]]:
    """Separate the tables in *index* of *archive*, shown as *path*, from the images; read the tables."""
    suffix, tables = os.fsencode(LABELS_FILE), []
    is_table = (index.names == suffix) | np.char.endswith(index.names, b"/" + suffix)
    for position in np.flatnonzero(is_table):
        name = bytes(index.names[position])
        with archive.open("rb") as file:
            file.seek(int(index.offsets[position]))
            content = file.read(int(index.sizes[position]))
        tables.append(Table(path / os.fsdecode(name), name.removesuffix(suffix), content))
    images = Index(
        names=index.names[~is_table], offsets=index.offsets[~is_table], sizes=index.sizes[~is_table]
    )
    return images, tables


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
            DECOMPRESSORS[suffix](path) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, CHUNK)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged ({error}); copy it again") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be decompressed to {folder} ({error.strerror}); set data.cache to a folder with "
            "enough space"
        ) from error
    return target
