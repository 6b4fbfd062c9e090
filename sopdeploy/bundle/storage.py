"""Storage for archives: folders, and stores that fsspec opens, such as S3 and the Hugging Face Hub.

Stores are not trusted. The archive is checked by its hashes, and by a signature if one is required.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, MissingPackageError
from sopdeploy.files import BLOCK_BYTES, atomic_write, writing


def put(file: Path, destination: str, name: str) -> str:
    """Copy *file* to *destination*, a folder or its URL, under *name*; return the new location.

    Readers never see an incomplete file under *name*. A failure leaves no new folder.
    """
    if "://" in destination:
        target = f"{destination.rstrip('/')}/{name}"
        with _filesystem(target) as (store, path):
            store.put_file(str(file), path)
        return target
    folder = Path(destination)
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with writing(folder / name, BundleError):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as partial:
                shutil.copyfile(file, partial)
        except OSError:
            with suppress(OSError):
                for parent in new:
                    parent.rmdir()
            raise
    return str(folder / name)


def get(source: str, file: Path, limit: int) -> None:
    """Copy *source*, a path or URL, to *file*; raise `BundleError` if it is larger than *limit* bytes."""
    if "://" in source:
        with _filesystem(source) as (store, path), store.open(path, "rb") as remote:
            _copy(remote, file, source, limit)
        return
    if not Path(source).is_file():
        problem = "a folder" if Path(source).is_dir() else "no such file"
        raise BundleError(f"{source}: {problem}; give the path of the .tar file that `push` wrote")
    with Path(source).open("rb") as local:
        _copy(local, file, source, limit)


def _copy(source: IO[bytes] | BinaryIO, file: Path, name: str, limit: int) -> None:
    """Copy *source* to *file*; raise `BundleError` naming *name* if it exceeds *limit* bytes."""
    size = 0
    with file.open("wb") as target:
        while block := source.read(BLOCK_BYTES):
            size += len(block)
            if size > limit:
                raise BundleError(f"{name}: larger than {limit} bytes, the limit; check the address")
            target.write(block)


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Convert errors of the client of a store to `BundleError`; clients raise types of several libraries."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # clients wrap errors of uploads
        text = " ".join(str(cause).split())
        raise BundleError(
            f"{url}: {type(cause).__name__}: {text}; check the address, the network and the credentials"
        ) from error


@contextmanager
def _filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the fsspec file system of *url* and the path in it; convert its errors to `BundleError`."""
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[s3]", MissingPackageError, url)
    with _remote_errors(url):
        yield fsspec.core.url_to_fs(url)
