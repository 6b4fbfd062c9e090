"""Files in memory: those that processes share, and private copies of files, which the kernel seals.

A seal holds for every process and every way to the file, such as `/proc/self/fd`: a copy that
changed could be other than what was checked. The processes of a server trust each other.
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

from sopdeploy.base.files import BLOCK_BYTES

# Of Linux: neither size nor content can change
SEALS = sum(getattr(fcntl, f"F_SEAL_{name}", 0) for name in ("GROW", "SHRINK", "SEAL", "WRITE"))


def create_memory(name: str, content: Iterable[bytes] | int) -> int:
    """Create a file in memory that processes share; return its descriptor.

    *content* is the size in bytes of a file that processes write later, or the blocks of one
    that they read. Raises `OSError`.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    with ExitStack() as unless_filled:
        unless_filled.callback(os.close, file)
        if isinstance(content, int):
            os.ftruncate(file, content)
        else:
            with open(file, "wb", closefd=False) as stream:
                stream.writelines(content)
        unless_filled.pop_all()
    return file


def map_memory(file: int) -> mmap.mmap:
    """Map *file* of `create_memory`, and close it; another process may write to it at any time."""
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)


def read_memory(file: int, max_bytes: int = sys.maxsize) -> bytes:
    """Read *file* of `create_memory`, and close it; raises `OSError` for more than *max_bytes*."""
    try:
        size = os.fstat(file).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes")
        return os.pread(file, size, 0)  # processes share the position of a file
    finally:
        os.close(file)


class SealedFile:
    """A copy of *blocks* in memory, which the kernel seals: no process can write to it, this one included.

    `path` leads to it as long as this object exists. It lies in no folder, so a graph cannot
    read a file beside it; runtimes get the weights of a large graph from `view`. Systems that
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
            with open(descriptor, "wb", closefd=False) as stream:
                stream.writelines(blocks)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)

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

    def view(self) -> memoryview:
        """Return the content for reading, without a copy of it."""
        return view_file(self.path)


def view_file(path: str | os.PathLike[str]) -> memoryview:
    """Return the content of a bundle's file at *path* for reading, without a copy of it; raises `OSError`."""
    with open(path, "rb") as file:  # noqa: PTH123
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


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
