"""Images charged to API keys by all front ends of a server, in shared memory.

Every front end writes its own sums and reads those of the others, so no lock is needed. Two requests at the
same moment may both get the last tokens; the bucket then goes below zero and the limit holds on average.
"""

import mmap
import os

KEYS = 4096  # the largest number of keys with a rate


class SharedSpending:
    """The sums of one front end (*row*) and of the others."""

    def __init__(self, file: int, row: int, rows: int) -> None:
        """Map the memory *file* of `create`; the file may be closed afterwards."""
        self._sums = memoryview(mmap.mmap(file, 8 * KEYS * rows)).cast("d")
        self._own, self._rows = row, rows

    @staticmethod
    def create(rows: int) -> int:
        """Create a memory file for *rows* front ends."""
        file = os.memfd_create("sopdeploy-limits", os.MFD_CLOEXEC)
        os.ftruncate(file, 8 * KEYS * rows)
        return file

    def add(self, key: int, images: int) -> None:
        """Charge *images* to the key with number *key*."""
        self._sums[self._own * KEYS + key] += images

    def others(self, key: int) -> float:
        """Return what the other front ends have charged to *key* since the server started."""
        return sum(self._sums[row * KEYS + key] for row in range(self._rows) if row != self._own)
