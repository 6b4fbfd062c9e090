"""The queue between the decoders and the model worker.

The queue is work-conserving: an idle worker gets what is there, and waits for more images only up to
`max_delay` seconds after the arrival of the oldest one. Images that arrive while a batch runs join the next
batch. Images whose request has ended or whose deadline has passed never leave the queue as part of a batch.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.inference.results import Outcome

if TYPE_CHECKING:  # OpenTelemetry is optional
    from sopdeploy_service.observability.tracing import RequestTrace

log = logging.getLogger("sopdeploy.engine")


@dataclass(eq=False, kw_only=True, slots=True)
class QueuedImage:
    """One image and the future that gets its outcome; times are those of `time.monotonic`.

    *image* (H, W, 3) uint8 is set, with *arrived*, before it enters a queue.
    """

    outcome: asyncio.Future[Outcome]
    deadline: float
    image: NDArray[np.uint8] = field(init=False, repr=False)
    warnings: tuple[str, ...] = ()
    decode_seconds: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    trace: "RequestTrace | None" = None


class RequestQueue:
    """Images in order of arrival. Thread-safe.

    Admission counts images before they are decoded and bounds the length of the queue.
    """

    def __init__(self, *, max_delay: float = 0.0) -> None:
        self._items: deque[QueuedImage] = deque()
        self._changed = threading.Condition()
        self._max_delay = max_delay
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: QueuedImage) -> bool:
        """Add *item*; return False, without adding it, if the queue is closed."""
        with self._changed:
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def discard(self, item: QueuedImage) -> None:
        """Remove *item* if it is still in the queue."""
        with self._changed:
            if item in self._items:
                self._items.remove(item)

    def take(self, max_size: int) -> list[QueuedImage]:
        """Wait for 1 to *max_size* images; an empty list means a closed queue."""
        with self._changed:
            while True:
                self._drop_expired()
                wait = None
                if self._items:
                    wait = self._items[0].arrived + self._max_delay - time.monotonic()
                    if wait <= 0 or len(self._items) >= max_size:
                        return [self._items.popleft() for _ in range(min(max_size, len(self._items)))]
                elif self._closed:
                    return []
                self._changed.wait(wait)

    def take_full(self, size: int) -> list[QueuedImage]:
        """Take exactly *size* images, or none if fewer are queued; never wait."""
        with self._changed:
            if len(self._items) >= size:
                self._drop_expired()
            return [self._items.popleft() for _ in range(size)] if len(self._items) >= size else []

    def close(self) -> list[QueuedImage]:
        """Accept no more images and return those that are still queued."""
        with self._changed:
            self._closed = True
            remaining = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return remaining

    def _drop_expired(self) -> None:
        now = time.monotonic()
        if any(item.outcome.done() or item.deadline <= now for item in self._items):
            self._items = deque(
                item for item in self._items if not item.outcome.done() and item.deadline > now
            )


def settle(items: Sequence[QueuedImage], outcomes: Sequence[Outcome]) -> None:
    """Set the outcome of each of *items* that has none yet. Call it on the event loop."""
    for item, outcome in zip(items, outcomes, strict=True):
        if not item.outcome.done():
            item.outcome.set_result(outcome)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: object) -> None:
    """Run *function* on *loop* from another thread; do nothing if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:
        log.debug("the event loop is closed; an outcome is dropped")
