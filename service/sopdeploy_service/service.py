"""What lives behind the HTTP face: admission, decoders and the repository of models.

The way of an image: admitted (or refused at once) -> decoded in a thread pool -> its model's batcher ->
outputs. A bad image is refused by the decoder, so it never meets the images of other requests.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ImageError
from sopdeploy_service.decode import Decoded, Sent, decode, keep_memory
from sopdeploy_service.faults import NONE, Faults
from sopdeploy_service.loading import loader
from sopdeploy_service.metrics import Metrics
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import (
    DEADLINE,
    DECODER_FAILED,
    DRAINING,
    ENGINE_DEAD,
    TOO_LATE,
    Answered,
    Outcome,
    Refusal,
    queue_full,
)
from sopdeploy_service.repository import Repository
from sopdeploy_service.schema import State
from sopdeploy_service.settings import Settings
from sopdeploy_service.shelf import Shelf
from sopdeploy_service.slots import Slots
from sopdeploy_service.tally import charge
from sopdeploy_service.timing import Stages
from sopdeploy_service.verified import Inference

LONGEST_RETRY_SECONDS = 60

Value = TypeVar("Value")

log = logging.getLogger("sopdeploy.service")


class Service:
    """Answers images from `start` to `stop`, once; every method is called on the event loop."""

    def __init__(
        self,
        inferences: Mapping[str, Inference],
        settings: Settings,
        shelf: Shelf | None = None,
        faults: Faults = NONE,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.requests = 0  # being answered now, counted by the middleware
        inferences = {
            name: replace(found, runtime=faults.over(found.runtime)) for name, found in inferences.items()
        }
        self.repository = Repository(inferences, settings, self.metrics, shelf)
        keep_memory(settings.decoders)
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decoder")
        self._parsers = ThreadPoolExecutor(settings.parsers, thread_name_prefix="parser")
        self.fetches = Slots(settings.url_fetches)
        self._decode_bytes = faults.over_decoder(partial(decode, load=loader(settings)))
        self.metrics.decoders(settings.decoders)
        self._admitted = 0
        self._draining = True

    @property
    def state(self) -> State:
        """Return `ok`, `draining` (also before `start`), `no_model` or `engine_dead`."""
        if self.repository.dead:
            return "engine_dead"
        if self._draining:
            return "draining"
        return "ok" if self.repository.names else "no_model"

    def start(self) -> None:
        """Start the threads; from here on images are answered."""
        self.repository.start()
        self._draining = False

    def drain(self) -> None:
        """Refuse new requests; those already here are answered."""
        self._draining = True

    def abandon(self) -> None:
        """Give up on what is not answered yet: the time to drain is over."""
        self._draining = True
        self.repository.close(DRAINING)

    async def stop(self) -> None:
        """End the threads."""
        self.abandon()
        for pool in (self._decoders, self._parsers):
            pool.shutdown(wait=False, cancel_futures=True)
        await self.repository.stop()

    def refusal(self, model: Model, deadline: float) -> Refusal | None:
        """Return why a new request for *model* gets no answer by *deadline*, before it is read; else None."""
        if model.dead:
            return ENGINE_DEAD
        if self._draining:
            return DRAINING
        full = self.overload(model)
        # An idle engine is always tried: an estimate that kept everybody out would never be corrected.
        if self._admitted and time.monotonic() + model.seconds(self._admitted + 1) > deadline:
            return full or TOO_LATE
        return full

    def overload(self, model: Model, images: int = 1) -> Refusal | None:
        """Return why so many *images* more cannot be admitted now, or None."""
        if self._admitted + images <= self.settings.queue_size:
            return None
        seconds = math.ceil(model.seconds(self._admitted))
        return queue_full(min(LONGEST_RETRY_SECONDS, max(1, seconds)))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Count a request as one admitted image while nobody knows yet how many it has."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    async def parse(self, read: Callable[..., Value], *given: object) -> Value:
        """Return what *read* returns for *given*, from one of few threads: it holds the interpreter."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, read, *given)

    async def classify(
        self, model: Model, images: Sequence[Sent], deadline: float, stages: Stages
    ) -> list[Outcome] | Refusal:
        """Return the outcome of each of the encoded *images*, in order, or why there is none at all.

        *deadline* is on the clock of `time.monotonic`. Cancelling this frees what it holds.
        """
        return await self._all(model, images, self._classify, deadline, stages)

    async def infer(
        self, model: Model, images: NDArray[np.uint8], deadline: float, stages: Stages
    ) -> list[Outcome] | Refusal:
        """Return the outcome of each of *images* (n, H, W, 3), which the client has decoded itself."""
        return await self._all(model, images, self._infer, deadline, stages)

    async def _all(
        self,
        model: Model,
        images: Sequence[Sent] | NDArray[np.uint8],
        work: Callable[..., Awaitable[Outcome]],
        deadline: float,
        stages: Stages,
    ) -> list[Outcome] | Refusal:
        started = time.monotonic()
        refused = self.overload(model, len(images)) or charge(len(images), stages)
        if refused is not None:
            return refused
        self._count(len(images))
        found: list[Outcome] | Refusal = DEADLINE
        try:
            with contextlib.suppress(TimeoutError), model.in_use():
                async with asyncio.timeout(deadline - time.monotonic()):
                    found = await gather(work(model, image, deadline, stages) for image in images)
        finally:
            self._count(-len(images))
        model.ledger.note(found, stages, time.monotonic() - started)
        return found

    async def _classify(self, model: Model, sent: Sent, deadline: float, stages: Stages) -> Outcome:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            decoded = await loop.run_in_executor(self._decoders, self._decode, model, sent)
        except ImageError as problem:
            return Refusal.of(problem)
        except Exception:  # a mistake of ours costs its own image, not those beside it in the form
            log.exception("the decoder failed on an image of %d bytes", len(sent.body))
            return DECODER_FAILED
        seconds = time.monotonic() - started
        self.metrics.stage("decode", seconds)
        stages.note("decode", seconds)
        outcome = await self._infer(model, decoded.pixels, deadline, stages)
        return replace(outcome, warnings=decoded.warnings) if isinstance(outcome, Answered) else outcome

    async def _infer(
        self, model: Model, image: NDArray[np.uint8], deadline: float, stages: Stages
    ) -> Outcome:
        outcome = await model.infer(image, deadline)
        if isinstance(outcome, Answered):
            stages.note("queue", outcome.queue_seconds, time.monotonic() - outcome.infer_seconds)
            stages.note("infer", outcome.infer_seconds)
        return outcome

    def _decode(self, model: Model, sent: Sent) -> Decoded:
        started = time.monotonic()
        try:
            return self._decode_bytes(
                sent,
                model.bundle.manifest.preprocess,
                max_bytes=self.settings.max_body_bytes,
                max_pixels=self.settings.max_pixels,
            )
        finally:
            self.metrics.decoded(time.monotonic() - started)

    def _count(self, images: int) -> None:
        self._admitted += images
        self.metrics.depth(self._admitted)


async def gather(work: Iterable[Awaitable[Outcome]]) -> list[Outcome]:
    """Return the outcomes of *work* in order, all awaited at once; one alone needs no task of its own."""
    waiting = list(work)
    if len(waiting) == 1:
        return [await waiting[0]]
    return list(await asyncio.gather(*waiting))
