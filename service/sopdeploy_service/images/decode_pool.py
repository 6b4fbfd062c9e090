"""Threads that decode images and pass the result on without waking the event loop."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import Decoded, EncodedImage

Decode = Callable[[EncodedImage, Preprocess], Decoded]

log = logging.getLogger("sopdeploy.service")


class PoolClosedError(Exception):
    """The pool was stopped before it decoded the image."""


class _Job(NamedTuple):
    image: EncodedImage
    preprocess: Preprocess
    on_done: Callable[[Decoded | Exception, float], None]
    cancelled: Callable[[], bool]


class DecodePool:
    """Runs *decode* in daemon threads, so that a hung decoder cannot block an exit."""

    def __init__(self, decode: Decode, threads: int) -> None:
        self._decode = decode
        self._threads = threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the threads."""
        for number in range(self._threads):
            threading.Thread(target=self._run, name=f"decoder_{number}", daemon=True).start()

    def submit(
        self,
        image: EncodedImage,
        preprocess: Preprocess,
        on_done: Callable[[Decoded | Exception, float], None],
        *,
        cancelled: Callable[[], bool],
    ) -> None:
        """Decode *image* in a thread, which calls *on_done* with the result and the seconds.

        Nothing happens if *cancelled* returns True when a thread is free.
        """
        self._jobs.put(_Job(image, preprocess, on_done, cancelled))

    def stop(self) -> None:
        """Fail the jobs that no thread has begun with `PoolClosedError` and end the threads."""
        with contextlib.suppress(queue.Empty):
            while job := self._jobs.get_nowait():
                job.on_done(PoolClosedError(), 0.0)
        for _ in range(self._threads):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.cancelled():
                started = time.monotonic()
                result: Decoded | Exception
                try:
                    result = self._decode(job.image, job.preprocess)
                except ImageError as error:
                    result = error
                except Exception as error:  # a bug fails its own image, not the others of the request
                    log.exception("the decoder failed on an image of %d bytes", len(job.image.body))
                    result = error
                job.on_done(result, time.monotonic() - started)
                del result
            del job  # an idle thread must not keep an image or a model alive
