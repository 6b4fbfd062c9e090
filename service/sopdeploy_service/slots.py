"""How many of something may be under way at once; one more is refused, none waits."""

from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """So many slots as *limit* says; used on one event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    @property
    def full(self) -> bool:
        """Return whether none is free."""
        return self.taken >= self._limit

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot, which the caller has seen to be free."""
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
