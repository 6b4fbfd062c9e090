"""Which images a tar archive holds and where in it they begin, so that each is one read away.

The index is in memory; where a cache folder is given it is kept there, under a name that changes when the
archive does.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.image_files import is_hidden, is_image
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

TAR = ".tar"
Entry = tuple[bytes, int, int]  # name, first byte, number of bytes
FORGET_FROM = 4096  # members, of which tarfile would keep all


@dataclass(frozen=True, slots=True)
class Index:
    """The images of one archive; `names` (N,) bytes, `offsets` and `sizes` (N,) int64 in bytes."""

    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def index_of(path: Path, cache: Path | None) -> Index:
    """Return the index of the tar file at *path*; raises `DataError` where it is none or is cut off."""
    kept = None if cache is None else cache / f"{path.name}.{fingerprint(path)}.index.npz"
    found = None if kept is None else read_index(kept, path.stat().st_size)
    if found is None:
        found = scan(path)
        if kept is not None:
            write_index(found, kept)
    return found


def fingerprint(path: Path) -> str:
    """Return what changes when the file at *path* does: its place, size and time; raises `DataError`."""
    try:
        status = path.stat()
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); give a file you may read") from problem
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def scan(path: Path) -> Index:
    """Return the index of *path*, read from the headers in it."""
    try:
        with path.open("rb") as file:
            entries = list(entries_of(file, path.stat().st_size))
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from problem
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as problem:
        raise DataError(f"{path}: not a whole tar file ({problem}); copy or unpack it again") from problem
    names, offsets, sizes = zip(*entries, strict=True) if entries else ((), (), ())
    return Index(
        names=np.asarray(names, dtype=np.bytes_),
        offsets=np.asarray(offsets, dtype=np.int64),
        sizes=np.asarray(sizes, dtype=np.int64),
    )


def entries_of(file: IO[bytes], end: int, prefix: str = "") -> Iterator[Entry]:
    """Yield the images of the archive that begins where *file* stands; a later member replaces an earlier.

    An archive inside it stands for a folder of its name, as in ImageNet's official file.
    """
    found: dict[str, tuple[int, int]] = {}
    archive: Any  # its list of members is no part of what typing knows
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            if len(archive.members) > FORGET_FROM:
                archive.members.clear()
            if member.isreg() and member.offset_data + member.size > end:
                raise DataError(f"{member.name} is cut off; copy the archive again")
            name = visible_name(prefix + member.name)
            if name is None:
                continue
            if name.endswith(TAR) and member.isreg() and not prefix:
                file.seek(member.offset_data)
                yield from entries_of(file, member.offset_data + member.size, name.removesuffix(TAR) + "/")
            elif is_image(name.rpartition("/")[2]):
                place = place_of(member, prefix, found)
                if place is not None:
                    found[name] = place
    for name, (offset, size) in found.items():
        yield os.fsencode(name), offset, size


def place_of(
    member: tarfile.TarInfo, prefix: str, found: dict[str, tuple[int, int]]
) -> tuple[int, int] | None:
    """Return where the bytes of *member* lie, for a second name of a file those of the first."""
    if member.islnk():
        return found.get(visible_name(prefix + member.linkname) or "")
    return (member.offset_data, member.size) if member.isreg() and member.sparse is None else None


def visible_name(name: str) -> str | None:
    """Return *name* without `.` and empty parts; `None` where a part is hidden or leads upwards."""
    parts = [part for part in PurePosixPath(name).parts if part not in {"/", "."}]
    if not parts or any(is_hidden(part) for part in parts):
        return None
    return "/".join(parts)


def write_index(index: Index, path: Path) -> None:
    """Keep *index*, whole or not at all."""
    try:
        with atomic_write(path, shared=True) as partial, partial.open("wb") as file:
            np.savez(file, names=index.names, offsets=index.offsets, sizes=index.sizes)
    except OSError as problem:
        raise DataError(
            f"{path}: cannot be written ({problem.strerror}); set data.cache elsewhere"
        ) from problem


def read_index(path: Path, size: int) -> Index | None:
    """Return the kept index of an archive of *size* bytes, or `None` where it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            index = Index(names=stored["names"], offsets=stored["offsets"], sizes=stored["sizes"])
    except Exception:  # whatever a damaged file makes of numpy's readers; the archive is read again
        return None
    arrays = (index.names, index.offsets, index.sizes)
    if index.names.dtype.kind != "S" or any(array.shape != (len(index.names),) for array in arrays):
        return None
    if any(array.dtype != np.int64 or (array < 0).any() for array in arrays[1:]):
        return None
    return index if (index.offsets + index.sizes <= size).all() else None
