"""Shared memory for the pixels of one front end, which the inference process reads.

The supervisor creates a sealed memory file for each front end: its size cannot change, so no process can make
another one fail when it reads. The front end decides which bytes an image uses, from the decoded image until
its result. The inference process checks only that they are inside the file.
"""

import fcntl
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MEMORY_BYTES = 1 << 25  # 222 images of 224 x 224; pages are allocated when they are used first
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_memory_file(size: int = MEMORY_BYTES) -> int:
    """Create a sealed memory file of *size* bytes; return its descriptor."""
    file = os.memfd_create("sopdeploy-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    return file


class PixelMemory:
    """A memory file mapped into this process. `take` and `give_back` are thread-safe."""

    def __init__(self, file: int) -> None:
        """Map the memory *file*, which is closed here."""
        self._memory = mmap.mmap(file, os.fstat(file).st_size)
        os.close(file)
        self._used: dict[int, int] = {}  # offset -> bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> int | None:
        """Reserve *size* bytes; return their offset, or None if no gap is large enough."""
        with self._lock:
            end = 0
            for offset in sorted(self._used):
                if offset - end >= size:
                    break
                end = offset + self._used[offset]
            if end + size > len(self._memory):
                return None
            self._used[end] = size
            return end

    def give_back(self, offset: int) -> None:
        """Free the bytes at *offset* for other images."""
        with self._lock:
            del self._used[offset]

    def close(self) -> None:
        """Unmap the memory as soon as no image in it is used."""
        del self._memory

    def image(self, offset: int, shape: Sequence[int]) -> NDArray[np.uint8]:
        """Return the image of *shape* (H, W, 3) at *offset*, without a copy.

        Raises `ValueError` if it is not inside the memory.
        """
        return np.frombuffer(self._memory, np.uint8, int(np.prod(shape)), offset).reshape(shape)
