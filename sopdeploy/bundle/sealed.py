"""Private copies of files that nothing can change any more, for libraries that read a file by its path."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO

from sopdeploy.files import BLOCK_BYTES

_SEALS = [getattr(fcntl, f"F_SEAL_{name}", 0) for name in ("WRITE", "GROW", "SHRINK", "SEAL")]  # of Linux


class SealedFile:
    """A copy of *blocks* in memory, which the kernel seals: no process can write to it, this one included.

    `path` leads to it as long as this object exists. It lies in no folder, so a graph that names a file
    beside it, such as one with external weights, cannot be opened. Systems that cannot seal files, such as
    macOS, get a file that is alone in a folder that only this user can open.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        descriptor: int | None = None  # of the file in memory; stays None for a file in a folder
        try:
            descriptor = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError):  # not Linux, or forbidden
            folder = tempfile.mkdtemp(prefix="sopdeploy-")
            self.path = os.path.join(folder, "sealed")  # noqa: PTH118
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        else:
            self.path = f"/proc/self/fd/{descriptor}"
            weakref.finalize(self, os.close, descriptor)
        with open(self.path, "wb") as file:  # noqa: PTH123
            file.writelines(blocks)
        if descriptor is not None:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, sum(_SEALS))

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
        self._file, self._missing, self._digest = file, size, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        while block := self._file.read(min(self._missing, BLOCK_BYTES)):
            self._missing -= len(block)
            self._digest.update(block)
            yield block

    @property
    def sha256(self) -> str:
        """The hash as hexadecimal digits."""
        return self._digest.hexdigest()
