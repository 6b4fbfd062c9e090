"""Files in memory that the kernel seals: those that processes share, and private copies of files.

A seal holds for every process and every way to the file, such as `/proc/self/fd`. What a
process gets from one that it does not trust counts only with the seals that make it safe to
read: a mapped file that shrinks would end its readers, and one that changes could be other than
what was checked.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import IO

from sopdeploy.files import BLOCK_BYTES

# Of Linux: fixed is the size and, with the second one, also the content.
SIZE = sum(getattr(fcntl, f"F_SEAL_{name}", 0) for name in ("GROW", "SHRINK", "SEAL"))
CONTENT = SIZE | getattr(fcntl, "F_SEAL_WRITE", 0)


def create_memory(name: str, content: Iterable[bytes] | int) -> int:
    """Create a file in memory that processes share; return its descriptor.

    *content* is the size in bytes of a file that every process may write, or the blocks of one
    that nothing can change any more. Raises `OSError`.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with ExitStack() as unless_sealed:
        unless_sealed.callback(os.close, file)
        _fill_and_seal(file, content)
        unless_sealed.pop_all()
    return file


def _fill_and_seal(file: int, content: Iterable[bytes] | int) -> None:
    if isinstance(content, int):
        os.ftruncate(file, content)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SIZE)
        return

    with open(file, "wb", closefd=False) as stream:
        stream.writelines(content)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, CONTENT)


def map_memory(file: int, size: int | None = None) -> mmap.mmap:
    """Map *file*, and close it; another process may write to it at any time.

    Raises `OSError` unless `create_memory` made it, and with *size* unless it has so many bytes.
    """
    try:
        _check_seals(file, SIZE)
        if size not in {None, os.fstat(file).st_size}:
            raise OSError(errno.EINVAL, "another size was announced")
        return mmap.mmap(file, 0)
    finally:
        os.close(file)


def read_memory(file: int, max_bytes: int = sys.maxsize) -> bytes:
    """Read *file*, and close it; raises `OSError` unless `create_memory` wrote up to *max_bytes* to it."""
    try:
        _check_seals(file, CONTENT)

        size = os.fstat(file).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes")
        return os.pread(file, size, 0)  # processes share the position of a file
    finally:
        os.close(file)


def _check_seals(file: int, seals: int) -> None:
    """Raise `OSError` unless *file* has *seals*; a pipe, a device or a file of a disk has none."""
    if fcntl.fcntl(file, fcntl.F_GET_SEALS) & seals != seals:
        raise OSError(errno.EPERM, "it is not sealed")


class SealedFile:
    """A copy of *blocks* in memory, which the kernel seals: no process can write to it, this one included.

    `path` leads to it as long as this object exists. It lies in no folder, so a graph that
    names a file beside it, such as one with external weights, cannot be opened. Systems that
    cannot seal files, such as macOS, get a file that is alone in a folder that only this user
    can open.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        try:
            descriptor = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError):  # not Linux, or forbidden
            folder = tempfile.mkdtemp(prefix="sopdeploy-")
            self.path = os.path.join(folder, "sealed")  # noqa: PTH118
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            with open(self.path, "wb") as file:  # noqa: PTH123
                file.writelines(blocks)
        else:
            self.path = f"/proc/self/fd/{descriptor}"
            weakref.finalize(self, os.close, descriptor)
            _fill_and_seal(descriptor, blocks)

    def __fspath__(self) -> str:
        return self.path

    def blocks(self) -> Iterator[bytes]:
        """Yield the content in parts of at most `BLOCK_BYTES`."""
        with open(self.path, "rb") as file:  # noqa: PTH123
            while block := file.read(BLOCK_BYTES):
                yield block

    def read(self) -> bytes:
        """Return the content."""
        with open(self.path, "rb") as file:  # noqa: PTH123
            return file.read()


class HashedBlocks:
    """The next *size* bytes of *file* in blocks; `sha256` is the hash of those that were read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._missing = size
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        while block := self._file.read(min(self._missing, BLOCK_BYTES)):
            self._missing -= len(block)
            self._digest.update(block)
            yield block

    @property
    def sha256(self) -> str:
        """The hash as hexadecimal digits."""
        return self._digest.hexdigest()
