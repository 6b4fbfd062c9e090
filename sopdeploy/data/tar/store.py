"""Tar archives as one folder of files, read in place without unpacking."""

import gzip
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.tar.index import Index, fingerprint, load_index
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".tar.xz": lzma.LZMAFile,
    ".tar.gz": gzip.GzipFile,
    ".tgz": gzip.GzipFile,
}
SUFFIXES = (".tar", *DECOMPRESSORS)
CHUNK = 1 << 20  # bytes
AFTER_SLASH = b"0"  # the byte after `/`: upper bound of the names inside a folder


def is_archive(path: Path) -> bool:
    """Check whether *path* has the suffix of a tar file, compressed or not."""
    return path.name.lower().endswith(SUFFIXES)


def cache_folder(folder: Path | None) -> Path:
    """Create the cache *folder*, by default a private one among the temporary files.

    Raises `DataError` if it cannot be created, or if other users can write to the default folder.
    """
    path = folder.expanduser() if folder else Path(tempfile.gettempdir()) / f"sopdeploy-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be created ({error.strerror}); set data.cache to a folder of yours"
        ) from error
    if folder is None and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise DataError(f"{path}: other users can write there; set data.cache to a folder of yours")
    return path


@dataclass(frozen=True, slots=True)
class TarStore:
    """Folder `prefix` of the images of several archives; `sources` (N,) are indices into `archives`.

    `names` is sorted. Each read opens its archive, so that processes share no position.
    """

    root: Path
    archives: tuple[Path, ...]
    names: NDArray[np.bytes_]
    sources: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    prefix: bytes = b""

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted."""
        return self._list_folder()[0]

    def open_folder(self, folder: str) -> "TarStore":
        """Open a subfolder as a store."""
        return replace(self, root=self.root / folder, prefix=self.prefix + os.fsencode(folder) + b"/")

    def list_files(self, folder: str) -> tuple[list[bytes], list[str]]:
        """List the images below a subfolder, relative to the store; the index holds no other files."""
        first, last = self._range(self.prefix + os.fsencode(folder) + b"/")
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

    def unwrap(self, parts: Sequence[str]) -> "TarStore":
        """Enter single folders that wrap all images, unless they are one of *parts* or the only class."""
        store = self
        while True:
            folders, has_files = store._list_folder()
            if has_files or len(folders) != 1 or folders[0] in parts:
                return store
            inside = replace(store.open_folder(folders[0]), root=self.root)
            folders, has_files = inside._list_folder()
            if has_files or not folders:
                return store
            store = inside

    def _list_folder(self) -> tuple[list[str], bool]:
        """List the subfolders, sorted, and check whether there are files beside them."""
        found: list[str] = []
        has_files = False
        position, end = self._range(self.prefix)
        while position < end:
            head, slash, _ = bytes(self.names[position])[len(self.prefix) :].partition(b"/")
            if slash:
                found.append(os.fsdecode(head))
                position = self._range(self.prefix + head + slash)[1]
            else:
                has_files = True
                position += 1
        return sorted(found), has_files


def open_tars(root: Path, paths: Sequence[Path], parts: Sequence[str], options: OpenOptions) -> TarStore:
    """Open the tar files *paths* as one folder, named *root* in error messages.

    An archive with images at its top level, or named like one of *parts* (train, val), becomes a folder of
    its name. A single folder around everything else is skipped. Raises `DataError`, also if two archives hold
    the same name.
    """
    cache = cache_folder(options.cache) if options.cache else None
    archives = tuple(_decompress(path, options) for path in paths)
    indices = [
        _mount(load_index(tar, cache), _stem(path), parts) for tar, path in zip(archives, paths, strict=True)
    ]
    names = np.concatenate([index.names for index in indices])
    sources = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.names) for index in indices])
    order = np.argsort(names, kind="stable")
    names, sources = names[order], sources[order]
    duplicates = np.flatnonzero(names[1:] == names[:-1])
    if len(duplicates):
        first, second = (paths[sources[duplicates[0] + step]] for step in (0, 1))
        name = bytes(names[duplicates[0]]).decode("utf-8", "replace")
        raise DataError(f"{name}: is both in {first} and in {second}; remove one")
    offsets = np.concatenate([index.offsets for index in indices])[order]
    sizes = np.concatenate([index.sizes for index in indices])[order]
    return TarStore(root, archives, names, sources, offsets, sizes).unwrap(parts)


def _decompress(path: Path, options: OpenOptions) -> Path:
    """Decompress *path* into the cache folder, once; plain tar files are used in place."""
    suffix = next((suffix for suffix in DECOMPRESSORS if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        return path
    folder = cache_folder(options.cache)
    target = folder / f"{_stem(path)}.{fingerprint(path)}.tar"
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


def _mount(index: Index, name: str, parts: Sequence[str]) -> Index:
    """Put the names of *index* into the folder *name* if the archive is a class or a part."""
    folder = os.fsencode(name) + b"/"
    inside = np.char.startswith(index.names, folder)
    top_level = np.char.find(index.names, b"/") < 0
    if not (top_level.any() or name in parts) or inside.all():
        return index
    return replace(index, names=np.char.add(folder, index.names))


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]
