"""The waiting line between the decoders, which put images in, and the engine.

The line is work-conserving: an engine that comes for a batch gets what is there. Only while it is
idle anyway does it wait for more, at most `max_delay` seconds from the arrival of the oldest item.
A batch is open until the engine takes it, so it grows while the engine is busy with the one before.
Items whose request has gone or whose deadline has passed never leave the line as part of a batch.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.inference.results import Outcome
from sopdeploy_service.observability.request_context import Trace

log = logging.getLogger("sopdeploy.engine")


@dataclass(eq=False, kw_only=True, slots=True)
class QueuedImage:
    """One image, who waits for its outcome, and until when (`time.monotonic`).

    Before it enters a line it has its *image* (H, W, 3) uint8, and *arrived* is when it got it.
    """

    outcome: asyncio.Future[Outcome]
    deadline: float
    image: NDArray[np.uint8] = field(init=False, repr=False)
    warnings: tuple[str, ...] = ()
    decode_seconds: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    trace: Trace | None = None

    def wanted(self, now: float) -> bool:
        """Return whether anybody still waits for this item at *now*."""
        return not self.outcome.done() and now < self.deadline


class RequestQueue:
    """Items in order of arrival. Every method may be called by any thread.

    The number of items is bounded by the admission in front of it, which counts them earlier.
    """

    def __init__(self, *, max_delay: float = 0.0) -> None:
        self._items: deque[QueuedImage] = deque()
        self._changed = threading.Condition()
        self._max_delay = max_delay
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: QueuedImage) -> bool:
        """Add *item*; return False, without it, where the line is closed."""
        with self._changed:
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def discard(self, item: QueuedImage) -> None:
        """Take *item* out if it still waits."""
        with self._changed:
            if item in self._items:
                self._items.remove(item)

    def take(self, largest: int) -> list[QueuedImage]:
        """Wait for a batch of 1 to *largest* wanted items and return it; empty: line closed."""
        with self._changed:
            while True:
                self._drop_unwanted()
                pause = self._pause(largest)
                if pause is not None and pause <= 0:
                    return [self._items.popleft() for _ in range(min(largest, len(self._items)))]
                if pause is None and self._closed:
                    return []
                self._changed.wait(pause)

    def take_full(self, size: int) -> list[QueuedImage]:
        """Return a batch of *size* wanted items where so many wait, else an empty one; never waits."""
        with self._changed:
            if len(self._items) >= size:
                self._drop_unwanted()
            return [self._items.popleft() for _ in range(size)] if len(self._items) >= size else []

    def close(self) -> Iterable[QueuedImage]:
        """Let nothing more in and return the items that were left, now taken out."""
        with self._changed:
            self._closed = True
            left = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return left

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        if not all(item.wanted(now) for item in self._items):
            self._items = deque(item for item in self._items if item.wanted(now))

    def _pause(self, largest: int) -> float | None:
        """Return the seconds until a batch should close: 0 is now, None is no item at all."""
        if not self._items:
            return None
        if len(self._items) >= largest:
            return 0.0
        return self._items[0].arrived + self._max_delay - time.monotonic()


def settle(items: Sequence[QueuedImage], outcomes: Sequence[Outcome]) -> None:
    """Give each of *items* its outcome; those that nobody waits for are passed over. On the loop."""
    for item, outcome in zip(items, outcomes, strict=True):
        if not item.outcome.done():
            item.outcome.set_result(outcome)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: object) -> None:
    """Run *function* on *loop*, from another thread; nothing where the loop is already closed."""
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:
        log.debug("the event loop is closed; an outcome is dropped")
