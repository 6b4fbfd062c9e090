"""The threads that make pixels of images and put them straight into the line of their model.

An image comes back to the event loop once, with its outcome: every time it did, the loop would have to wake.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import Decoded, EncodedImage
from sopdeploy_service.inference.queue import QueuedImage, call_soon, settle
from sopdeploy_service.inference.results import DECODER_FAILED, DRAINING, Rejection
from sopdeploy_service.observability.metrics import Metrics

Decode = Callable[[EncodedImage, Preprocess], Decoded]
Put = Callable[[QueuedImage], Rejection | None]  # into a line; or why not
Order = tuple[QueuedImage, EncodedImage, Preprocess, Put]

log = logging.getLogger("sopdeploy.service")


class DecodePool:
    """So many *threads* that run *decode*; every method is called on the event loop."""

    def __init__(self, decode: Decode, threads: int, metrics: Metrics) -> None:
        self._decode = decode
        self._metrics = metrics
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._threads = threads

    def start(self) -> None:
        """Start the threads; refusals go to futures of the running loop."""
        loop = asyncio.get_running_loop()
        for number in range(self._threads):
            threading.Thread(target=self._live, args=(loop,), name=f"decoder_{number}", daemon=True).start()

    def hand_in(self, item: QueuedImage, sent: EncodedImage, rules: Preprocess, put: Put) -> None:
        """Let *item* have the pixels of *sent* and *put* it into its line; a bad image is its outcome."""
        self._orders.put((item, sent, rules, put))

    def stop(self) -> None:
        """Refuse what no thread has begun, and let the threads end."""
        with contextlib.suppress(queue.Empty):
            while order := self._orders.get_nowait():
                settle([order[0]], [DRAINING])
        for _ in range(self._threads):
            self._orders.put(None)

    def _live(self, loop: asyncio.AbstractEventLoop) -> None:
        while (order := self._orders.get()) is not None:
            item, sent, rules, put = order
            if not item.outcome.done():  # else its request has gone meanwhile
                refusal = self._pixels(item, sent, rules) or put(item)
                if refusal is not None:
                    call_soon(loop, settle, [item], [refusal])
            del order, item, sent, put  # while this thread waits, it keeps no image and no model

    def _pixels(self, item: QueuedImage, sent: EncodedImage, rules: Preprocess) -> Rejection | None:
        started = time.monotonic()
        try:
            decoded = self._decode(sent, rules)
        except ImageError as problem:
            return Rejection.of(problem)
        except Exception:  # a mistake of ours costs its own image, not those beside it in the form
            log.exception("the decoder failed on an image of %d bytes", len(sent.body))
            return DECODER_FAILED
        finally:
            ended = time.monotonic()
            self._metrics.decoded(ended - started)
        item.image = decoded.pixels
        item.warnings = decoded.warnings
        item.decode_seconds = ended - item.arrived
        item.arrived = ended
        self._metrics.stage("decode", item.decode_seconds)
        return None
