"""Where archives are kept: a folder, an object store that fsspec knows, or an OCI registry.

A place takes a file under a name and gives a file of at most so many bytes. What a store gives is nobody's
word: the archive proves itself by hashes, and by a signature where one is asked for.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.bundle import READ_BYTES
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.extras import imported
from sopdeploy.whole import whole

OCI = "oci://"


def put(file: Path, place: str, name: str) -> str:
    """Copy *file* to *place*, a folder or a URL of one, under *name*; return where it is now.

    In a folder, and in every object store, the name is there only once the content is whole.
    """
    if "://" in place:
        target = f"{place.rstrip('/')}/{name}"
        with stored(target) as (store, path):
            store.put_file(str(file), path)
        return target
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / name) as partial:
            shutil.copyfile(file, partial)
    except OSError as problem:
        raise BundleError(f"{folder / name}: cannot be written ({problem.strerror})") from problem
    return str(folder / name)


def get(source: str, file: Path, limit: int) -> None:
    """Write what lies at *source*, a path or a URL, to *file*; raises `BundleError` beyond *limit* bytes."""
    if "://" in source:
        with stored(source) as (store, path), store.open(path, "rb") as remote:
            copy_limited(remote, file, source, limit)
        return
    if not Path(source).is_file():
        raise BundleError(f"{source}: no archive here; say the path of the .tar that `push` wrote")
    if not os.access(source, os.R_OK):
        raise BundleError(f"{source}: cannot be read; ask for the permission")
    with Path(source).open("rb") as near:  # what goes wrong now is of where *file* lies
        copy_limited(near, file, source, limit)


def copy_limited(source: IO[bytes] | BinaryIO, file: Path, name: str, limit: int) -> None:
    """Write *source* to *file*; raises `BundleError` as soon as it is longer than *limit* bytes."""
    left = limit
    with file.open("wb") as target:
        while block := source.read(READ_BYTES):
            left -= len(block)
            if left < 0:
                raise BundleError(f"{name}: larger than {limit} bytes; `--max-bytes` allows more")
            target.write(block)


@contextmanager
def stored(url: str) -> Iterator[tuple[Any, str]]:
    """Give the store of *url*, by fsspec, and the path in it.

    Raises `BundleError` for whatever the store says, `ConfigError` without fsspec.
    """
    fsspec = imported("fsspec", "fsspec", "sopdeploy[s3]", ConfigError, url)
    try:
        yield fsspec.core.url_to_fs(url)
    except (BundleError, ConfigError):
        raise
    except Exception as problem:  # every store has errors of its own, and none of them is ours
        raise BundleError(f"{url}: {type(problem).__name__}: {problem}") from problem
