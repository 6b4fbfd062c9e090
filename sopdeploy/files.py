"""Files that are whole or not there: each is written beside its place and takes it in one step."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give the name to write under; what is there after the block becomes *path*, after an error it goes.

    A file that several processes may write at once is *shared*: each writes under a name of its own.
    Errors of the file system are the caller's to explain.
    """
    own = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{own}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the hash of the file at *path* as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
