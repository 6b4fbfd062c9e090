"""A compressed archive cannot be read from the middle: it is unpacked once, into a cache folder."""

import gzip
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sopdeploy.data.store import Opening
from sopdeploy.data.tar_index import fingerprint
from sopdeploy.errors import DataError
from sopdeploy.whole import whole

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
        with whole(target, shared=True) as partial, reader(path) as source, partial.open("wb") as sink:
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
