"""Tar archives as one folder of files, read in place: nothing is unpacked, any file is one read away."""

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

from sopdeploy.data.image_files import Opening
from sopdeploy.data.tar.index import Index, fingerprint, index_of
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

READERS: dict[str, Callable[[Path], Any]] = {
    ".tar.xz": lzma.LZMAFile,
    ".tar.gz": gzip.GzipFile,
    ".tgz": gzip.GzipFile,
}
ARCHIVES = (".tar", *READERS)
PIECE = 1 << 20  # bytes


def is_archive(path: Path) -> bool:
    """Say whether the name of *path* is that of a tar file, compressed or not."""
    return path.name.lower().endswith(ARCHIVES)


def stem(path: Path) -> str:
    """Return the name of an archive without its ending."""
    ending = next(ending for ending in ARCHIVES if path.name.lower().endswith(ending))
    return path.name[: -len(ending)]


def as_plain_tar(path: Path, opening: Opening) -> Path:
    """Return *path*, or the tar file that it is once unpacked; raises `DataError`."""
    ending = next((ending for ending in READERS if path.name.lower().endswith(ending)), None)
    if ending is None:
        return path
    folder = cache_folder(opening.cache)
    target = folder / f"{stem(path)}.{fingerprint(path)}.tar"
    if not target.exists():
        opening.say(f"unpacking {path} once into {target}" + ("" if opening.cache else "; or set data.cache"))
        unpack(path, READERS[ending], target)
    return target


def unpack(path: Path, reader: Callable[[Path], Any], target: Path) -> None:
    """Write what *path* holds to *target*, whole or not at all."""
    try:
        with atomic_write(target, shared=True) as partial, reader(path) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, PIECE)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{path}: damaged ({problem}); copy it again") from problem
    except OSError as problem:
        raise DataError(
            f"{path}: cannot be unpacked into {target.parent} ({problem.strerror}); set data.cache to a "
            "folder with room"
        ) from problem


def cache_folder(wanted: Path | None) -> Path:
    """Return the folder for what is made of archives: the user's, or an own one among temporary files.

    Raises `DataError` where it cannot be made, or where somebody else could have put files into it.
    """
    folder = wanted.expanduser() if wanted else Path(tempfile.gettempdir()) / f"sopdeploy-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as problem:
        raise DataError(
            f"{folder}: cannot be made ({problem.strerror}); set data.cache to a folder of yours"
        ) from problem
    if wanted is None and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise DataError(f"{folder}: others may write there; set data.cache to a folder of yours")
    return folder


AFTER_SLASH = b"0"  # the byte after `/`: ends the names of a folder in their order


@dataclass(frozen=True, slots=True)
class Members:
    """The images of several archives, sorted by name; `sources` says in which of `archives` one lies."""

    archives: tuple[Path, ...]
    names: NDArray[np.bytes_]
    sources: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def position(self, name: bytes) -> int:
        """Return where *name* stands; raises `FileNotFoundError`."""
        found = int(np.searchsorted(self.names, name))
        if found == len(self.names) or self.names[found] != name:
            raise FileNotFoundError(2, "No such file in the archive", name)
        return found

    def between(self, prefix: bytes) -> tuple[int, int]:
        """Return where the names that begin with the folder *prefix* (with its slash) start and end."""
        if not prefix:
            return 0, len(self.names)
        first, last = np.searchsorted(self.names, [prefix, prefix[:-1] + AFTER_SLASH])
        return int(first), int(last)


@dataclass(frozen=True, slots=True)
class TarStore:
    """What lies below `prefix` in the archives; each read opens its file, so that processes share nothing."""

    root: Path
    members: Members
    prefix: bytes = b""

    def folders(self) -> list[str]:
        """Return the names of the folders, sorted."""
        found: list[str] = []
        names = self.members.names
        at, end = self.members.between(self.prefix)
        while at < end:
            head, slash, _ = bytes(names[at])[len(self.prefix) :].partition(b"/")
            if slash:
                found.append(head.decode("utf-8", "surrogateescape"))
                at = self.members.between(self.prefix + head + slash)[1]
            else:
                at += 1
        return sorted(found)

    def below(self, folder: str) -> "TarStore":
        """Return the store that one of the folders is."""
        return replace(self, root=self.root / folder, prefix=self.prefix + encoded(folder) + b"/")

    def images(self, folder: str) -> list[bytes]:
        """Return the images of one folder and of those in it, sorted."""
        first, last = self.members.between(self.prefix + encoded(folder) + b"/")
        return [bytes(name)[len(self.prefix) :] for name in self.members.names[first:last]]

    def others(self, folder: str) -> list[str]:  # noqa: ARG002 - an index holds images only
        """Return nothing: what is no image is not known here."""
        return []

    def read(self, name: bytes) -> bytes:
        """Return the bytes of a file; raises `OSError`."""
        at = self.members.position(self.prefix + name)
        with self.members.archives[self.members.sources[at]].open("rb", buffering=0) as file:
            file.seek(int(self.members.offsets[at]))
            return file.read(int(self.members.sizes[at])) or b""

    def size(self, name: bytes) -> int:
        """Return the number of bytes of a file; raises `OSError`."""
        return int(self.members.sizes[self.members.position(self.prefix + name)])

    def has_files(self) -> bool:
        """Say whether files lie here beside the folders."""
        first, last = self.members.between(self.prefix)
        return any(b"/" not in bytes(name)[len(self.prefix) :] for name in self.members.names[first:last])


def open_tars(root: Path, paths: Sequence[Path], parts: Sequence[str], opening: Opening) -> TarStore:
    """Return the images of the tar files *paths* as one folder that errors call *root*.

    An archive that has its images at the top, or is named like one of *parts* (train, val), stands for a
    folder of its name. A single folder around everything else is passed over. Raises `DataError`, also
    where two archives hold the same name.
    """
    cache = cache_folder(opening.cache) if opening.cache else None
    plain = tuple(as_plain_tar(path, opening) for path in paths)
    indices = [
        mounted(index_of(tar, cache), stem(path), parts) for tar, path in zip(plain, paths, strict=True)
    ]
    store = TarStore(root, joined(plain, indices, paths))
    while not store.has_files() and len(inside := store.folders()) == 1 and inside[0] not in parts:
        within = store.below(inside[0])
        if within.has_files() or not within.folders():
            break
        store = replace(within, root=root)
    return store


def mounted(index: Index, name: str, parts: Sequence[str]) -> Index:
    """Return *index* with its names below the folder *name* where the archive stands for it."""
    folder = encoded(name) + b"/"
    inside = np.char.startswith(index.names, folder)
    at_the_top = np.char.find(index.names, b"/") < 0
    if not (at_the_top.any() or name in parts) or inside.all():
        return index
    return replace(index, names=np.char.add(folder, index.names))


def joined(plain: tuple[Path, ...], indices: Sequence[Index], paths: Sequence[Path]) -> Members:
    """Return the members of all archives, sorted by name; raises `DataError` for a name in two of them."""
    names = np.concatenate([index.names for index in indices])
    sources = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.names) for index in indices])
    order = np.argsort(names, kind="stable")
    names, sources = names[order], sources[order]
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        first, second = (paths[sources[twice[0] + step]] for step in (0, 1))
        name = bytes(names[twice[0]]).decode("utf-8", "replace")
        raise DataError(f"{name}: lies both in {first} and in {second}; remove one")
    return Members(
        archives=plain,
        names=names,
        sources=sources,
        offsets=np.concatenate([index.offsets for index in indices])[order],
        sizes=np.concatenate([index.sizes for index in indices])[order],
    )


def encoded(name: str) -> bytes:
    """Return a name as archives and file systems hold it."""
    return name.encode("utf-8", "surrogateescape")
