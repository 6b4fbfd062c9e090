"""Index of the images in a tar archive, so that each is read with one seek.

With a cache folder, the index is stored under a name that changes with the archive.
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

from sopdeploy.data.folder_store import is_image
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

TAR = ".tar"
MAX_KEPT_MEMBERS = 4096  # tarfile would keep all members in memory


@dataclass(frozen=True, slots=True)
class Index:
    """Images of one archive: `names` (N,) bytes, `offsets` and `sizes` (N,) int64 in bytes."""

    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def load_index(path: Path, cache: Path | None) -> Index:
    """Load the index of the tar file at *path* from *cache*, or build and store it.

    Raises `DataError` if the file is damaged or not a tar file.
    """
    if cache is None:
        return _build_index(path)
    stored = cache / f"{path.name}.{fingerprint(path)}.index.npz"
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
    """Hash the path, size and modification time of a file; raises `DataError`."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
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
            entries = list(_scan(file, path.stat().st_size))
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


def _scan(file: IO[bytes], end: int, prefix: str = "") -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, size) of the images of the archive that starts at the position of *file*.

    A later member replaces an earlier one of the same name. An archive inside the archive is treated as a
    folder of its name, as in ImageNet's official file.
    """
    found: dict[str, tuple[int, int]] = {}
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
                yield from _scan(file, member.offset_data + member.size, name.removesuffix(TAR) + "/")
            elif is_image(name.rpartition("/")[2]):
                if member.islnk():
                    place = found.get(_visible_name(prefix + member.linkname) or "")
                else:
                    place = (member.offset_data, member.size)
                if place is not None and (member.islnk() or (member.isreg() and member.sparse is None)):
                    found[name] = place
    for name, (offset, size) in found.items():
        yield os.fsencode(name), offset, size


def _visible_name(name: str) -> str | None:
    """Remove `.` and empty parts from *name*; None if a part is hidden or `..`."""
    parts = [part for part in PurePosixPath(name).parts if part not in {"/", "."}]
    if not parts or any(part.startswith(".") for part in parts):
        return None
    return "/".join(parts)
