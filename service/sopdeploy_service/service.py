"""What lives behind the HTTP face: admission, decoders and batcher of one bundle.

The way of an image: admitted (or refused at once) -> decoded in a thread pool -> batcher -> logits.
A bad image is refused by the decoder, so it never meets the images of other requests.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sopdeploy.errors import ImageError
from sopdeploy_service.batcher import Batcher
from sopdeploy_service.decode import Decoded, Sent, decode
from sopdeploy_service.metrics import Metrics
from sopdeploy_service.open_inference import Inference
from sopdeploy_service.outcome import (
    DEADLINE,
    DRAINING,
    ENGINE_DEAD,
    Answered,
    Outcome,
    Refusal,
    queue_full,
)
from sopdeploy_service.schema import State
from sopdeploy_service.settings import Settings
from sopdeploy_service.timing import Stages

LONGEST_RETRY_SECONDS = 60


class Service:
    """Answers images from `start` to `stop`, once; every method is called on the event loop."""

    def __init__(self, inference: Inference, settings: Settings) -> None:
        self.inference = inference
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.serves(inference.bundle, inference.runtime)
        self.requests = 0  # being answered now, counted by the middleware
        self._batcher = Batcher(inference, settings, self.metrics)
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decoder")
        self._admitted = 0
        self._draining = True

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""
        return self.inference.bundle.labels

    @property
    def state(self) -> State:
        """Return `ok`, `draining` (also before `start`) or `engine_dead`."""
        if self._batcher.dead:
            return "engine_dead"
        return "draining" if self._draining else "ok"

    def start(self) -> None:
        """Start the threads; from here on images are answered."""
        self._batcher.start()
        self._draining = False

    def drain(self) -> None:
        """Refuse new requests; those already here are answered."""
        self._draining = True

    def abandon(self) -> None:
        """Give up on what is not answered yet: the time to drain is over."""
        self._draining = True
        self._batcher.close(DRAINING)

    async def stop(self) -> None:
        """End the threads."""
        self.abandon()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await self._batcher.stop()

    def refusal(self) -> Refusal | None:
        """Return why a new request gets no answer now, before it is read; None where it may."""
        if self._batcher.dead:
            return ENGINE_DEAD
        if self._draining:
            return DRAINING
        return self._overload(1)

    async def classify(
        self, images: Sequence[Sent], deadline: float, stages: Stages
    ) -> list[Outcome] | Refusal:
        """Return the outcome of each of *images*, in order, or why the request as a whole has none.

        *deadline* is on the clock of `time.monotonic`. Cancelling this frees what it holds.
        """
        full = self._overload(len(images))
        if full is not None:
            return full
        self._count(len(images))
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.gather(*(self._classify(image, deadline, stages) for image in images))
        except TimeoutError:
            return DEADLINE
        finally:
            self._count(-len(images))

    async def _classify(self, sent: Sent, deadline: float, stages: Stages) -> Outcome:
        started = time.monotonic()
        try:
            decoded = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, sent)
        except ImageError as problem:
            return Refusal.of(problem)
        seconds = time.monotonic() - started
        self.metrics.stage("decode", seconds)
        stages.note("decode", seconds)
        outcome = await self._batcher.submit(decoded.pixels, deadline)
        if isinstance(outcome, Answered):
            stages.note("queue", outcome.queue_seconds)
            stages.note("infer", outcome.infer_seconds)
            return replace(outcome, warnings=decoded.warnings)
        return outcome

    def _decode(self, sent: Sent) -> Decoded:
        return decode(
            sent,
            self.inference.bundle.manifest.preprocess,
            max_bytes=self.settings.max_body_bytes,
            max_pixels=self.settings.max_pixels,
        )

    def _overload(self, images: int) -> Refusal | None:
        if self._admitted + images <= self.settings.queue_size:
            return None
        seconds = self._admitted * self._batcher.seconds_per_image
        return queue_full(min(LONGEST_RETRY_SECONDS, max(1, math.ceil(seconds))))

    def _count(self, images: int) -> None:
        self._admitted += images
        self.metrics.depth(self._admitted)
