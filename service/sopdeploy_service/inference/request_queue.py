"""The queue of images of a model, from which its worker takes batches.

The queue is work-conserving: an idle worker takes the images that are queued, and does not wait
for more. Images whose request has ended or whose deadline has passed are removed and do not run.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.inference.model import ImageResult
from sopdeploy_service.inference.results import HttpError

log = logging.getLogger("sopdeploy.inference")


@dataclass(eq=False, slots=True)
class QueuedImage:
    """One image (H, W, 3) uint8 and *deliver*, which gets its result on the event loop, at most once.

    Times are those of `time.monotonic`. *features* requests the embedding. The image *is_over*
    when it has its result, or when nobody waits for one. Once it is *in_batch*, its pixels are
    read until it is settled.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    deadline: float
    deliver: Callable[[ImageResult | HttpError], None]
    features: bool = False
    arrived: float = field(default_factory=time.monotonic)
    is_over: bool = False
    in_batch: bool = False

    def settle(self, result: ImageResult | HttpError) -> None:
        """Deliver *result* unless the image is over. Call it on the event loop."""
        if not self.is_over:
            self.is_over = True
            self.deliver(result)


@dataclass(eq=False)
class RequestQueue:
    """Images in order of arrival; thread-safe. The limit of admitted images limits its length, too."""

    batch_seconds: Callable[[int], float] = lambda _: 0.0  # of a batch, by its number of images
    closed_with: HttpError | None = None
    _images: deque[QueuedImage] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, image: QueuedImage) -> None:
        """Add *image*; if the queue is closed, settle it with the reason instead."""
        with self._changed:
            if self.closed_with is None:
                self._images.append(image)
                self._changed.notify()
                return

        image.settle(self.closed_with)

    def remove(self, image: QueuedImage) -> bool:
        """Remove *image*, for which nobody waits any more; if its batch has begun, only return False."""
        with self._changed:
            if image.in_batch:
                return False

            image.is_over = True
            with contextlib.suppress(ValueError):  # `take` has removed it after its deadline
                self._images.remove(image)
            return True

    def take(self, max_size: int, *, only_full: bool = False) -> list[QueuedImage]:
        """Wait for the first image, and return those that are queued, at most *max_size*.

        The result is empty if the queue is closed. With *only_full*, never wait: take exactly
        *max_size* images, or none if fewer are queued. Images that are over or late are
        removed, and never returned; so are those that a batch would answer too late, unless
        there are no others.
        """
        with self._changed:
            while True:
                # Drop the images for which nobody waits any more.
                now = time.monotonic()
                # A loop here would leave its last image in a variable, and so alive, during the
                # wait below.
                self._images = deque(
                    one for one in self._images if not one.is_over and one.deadline > now
                )

                # An estimate that is too high must not skip all images: none would correct it.
                end = now + self.batch_seconds(min(len(self._images), max_size))
                if any(one.deadline > end for one in self._images):
                    self._images = deque(one for one in self._images if one.deadline > end)

                if len(self._images) >= max_size:
                    return self._pop(max_size)

                if only_full or self.closed_with is not None:  # a closed queue is empty
                    return []

                if self._images:
                    return self._pop(len(self._images))
                self._changed.wait()

    def _pop(self, count: int) -> list[QueuedImage]:
        """Remove the *count* oldest images, now in a batch, and return them."""
        images = [self._images.popleft() for _ in range(count)]

        for image in images:
            image.in_batch = True
        return images

    def close(self, reason: HttpError) -> list[QueuedImage]:
        """Give *reason* to every image from now on; remove and return those that are queued, unsettled."""
        with self._changed:
            self.closed_with = reason
            remaining = list(self._images)
            self._images.clear()
            self._changed.notify_all()
            return remaining


def call_soon(
    loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: object
) -> None:
    """Run *function* on *loop* from another thread; do nothing if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:
        log.debug("the event loop is closed; an outcome is dropped")
