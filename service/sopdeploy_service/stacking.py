"""The images of a batch side by side, in memory that is used again for the next one.

New memory of this size comes from the system page by page, and to get it costs more than to fill it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Stack:
    """Room for *largest* images; for one thread, and for runtimes that keep nothing of what they get."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._room: NDArray[np.uint8] | None = None

    def of(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return *images* (H, W, 3), at most *largest*, as (n, H, W, 3); it holds until the next call."""
        first = images[0]
        if len(images) == 1:
            return first[None]
        if self._room is None or self._room.shape[1:] != first.shape:
            self._room = np.empty((self._largest, *first.shape), first.dtype)
        return np.stack(images, out=self._room[: len(images)])
