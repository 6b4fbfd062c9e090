"""What lives behind the HTTP face: admission, decoders and the repository of models.

The way of an image: admitted (or refused at once) -> decoded in a thread -> its model's batcher -> outputs.
Whoever knows its outcome first settles it: the decoder that finds it bad, the engine, or the deadline. A bad
image never meets the images of other requests.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.images.decode import EncodedImage, decode, keep_memory
from sopdeploy_service.images.decode_pool import DecodePool
from sopdeploy_service.images.loaders import loader
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.fault_injection import NO_FAULTS, Faults
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.queue import QueuedImage, settle
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DRAINING,
    ENGINE_DEAD,
    TOO_LATE,
    Outcome,
    Prediction,
    Rejection,
    queue_full,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.settings import Settings

State: TypeAlias = Literal["ok", "draining", "no_model", "engine_dead", "loop_blocked"]


LONGEST_RETRY_SECONDS = 60

Value = TypeVar("Value")


class Service:
    """Answers images from `start` to `stop`, once; every method is called on the event loop."""

    def __init__(
        self,
        inferences: Mapping[str, LoadedModel],
        settings: Settings,
        shelf: BundleStore | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.active_requests = 0  # being answered now, counted by the middleware
        self.registry = ModelRegistry(inferences, settings, self.metrics, shelf, faults)
        keep_memory(settings.decoders)
        decode_one = partial(
            faults.over_decoder(decode),
            max_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            load=loader(settings),
        )
        self._decoders = DecodePool(decode_one, settings.decoders, self.metrics)
        self._parsers = ThreadPoolExecutor(settings.parsers, thread_name_prefix="parser")
        self.fetches = asyncio.Semaphore(settings.url_fetches)
        self.metrics.decoders(settings.decoders)
        self._admitted = 0
        self.metrics.depth(lambda: self._admitted)
        self._draining = True

    @property
    def state(self) -> State:
        """Return `ok`, `draining` (also before `start`), `no_model` or `engine_dead`."""
        if self.registry.dead:
            return "engine_dead"
        if self._draining:
            return "draining"
        return "ok" if self.registry.names else "no_model"

    def start(self) -> None:
        """Start the threads; from here on images are answered."""
        self.registry.start()
        self._decoders.start()
        self._draining = False

    def drain(self) -> None:
        """Refuse new requests; those already here are answered."""
        self._draining = True

    def abort(self) -> None:
        """Give up on what is not answered yet: the time to drain is over."""
        self._draining = True
        self.registry.close(DRAINING)

    async def stop(self) -> None:
        """End the threads."""
        self.abort()
        self._decoders.stop()
        self._parsers.shutdown(wait=False, cancel_futures=True)
        await self.registry.stop()

    def check_admission(self, model: Model, deadline: float) -> Rejection | None:
        """Return why a new request for *model* gets no answer by *deadline*, before it is read; else None."""
        if model.dead:
            return ENGINE_DEAD
        if self._draining:
            return DRAINING
        full = self.check_queue(model)
        # An idle engine is always tried: an estimate that kept everybody out would never be corrected.
        if self._admitted and time.monotonic() + model.seconds(self._admitted + 1) > deadline:
            return full or TOO_LATE
        return full

    def check_queue(self, model: Model, images: int = 1) -> Rejection | None:
        """Return why so many *images* more cannot be admitted now, or None."""
        if self._admitted + images <= self.settings.queue_size:
            return None
        seconds = math.ceil(model.seconds(self._admitted))
        return queue_full(min(LONGEST_RETRY_SECONDS, max(1, seconds)))

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """Count a request as one admitted image while nobody knows yet how many it has."""
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def parse(self, read: Callable[..., Value], *given: object) -> Value:
        """Return what *read* returns for *given*, from one of few threads: it holds the interpreter."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, read, *given)

    async def classify(
        self, model: Model, images: Sequence[EncodedImage], deadline: float, context: RequestContext
    ) -> list[Outcome] | Rejection:
        """Return the outcome of each of the encoded *images*, in order, or why there is none at all.

        *deadline* is on the clock of `time.monotonic`; *model* must be in use. Cancelling this frees what it
        holds.
        """
        rules = model.bundle.manifest.preprocess

        def begin(item: QueuedImage, image: EncodedImage) -> None:
            self._decoders.hand_in(item, image, rules, model.put)

        return await self._all(model, images, begin, deadline, context)

    async def infer(
        self, model: Model, images: NDArray[np.uint8], deadline: float, context: RequestContext
    ) -> list[Outcome] | Rejection:
        """Return the outcome of each of *images* (n, H, W, 3), which the client has decoded itself."""

        def begin(item: QueuedImage, image: NDArray[np.uint8]) -> None:
            item.image = image
            refusal = model.put(item)
            if refusal is not None:
                settle([item], [refusal])

        return await self._all(model, images, begin, deadline, context)

    async def _all(
        self,
        model: Model,
        images: Sequence[Value] | NDArray[np.uint8],
        begin: Callable[[QueuedImage, Any], None],
        deadline: float,
        context: RequestContext,
    ) -> list[Outcome] | Rejection:
        started = time.monotonic()
        refused = self.check_queue(model, len(images))
        if refused is not None:
            return refused
        context.charge(len(images))
        loop = asyncio.get_running_loop()
        items = [
            QueuedImage(outcome=loop.create_future(), deadline=deadline, trace=context.trace) for _ in images
        ]
        late = loop.call_later(deadline - started, give_up, model, items, DEADLINE)
        self._admitted += len(images)
        try:
            for item, image in zip(items, images, strict=True):
                begin(item, image)
            outcomes = [await item.outcome for item in items]
        except asyncio.CancelledError:
            give_up(model, items, CLIENT_GONE)
            raise
        finally:
            late.cancel()
            self._admitted -= len(images)
        note_stages(context, items, outcomes)
        found = DEADLINE if any(outcome is DEADLINE for outcome in outcomes) else outcomes
        model.statistics.note(found, context.stage_seconds, time.monotonic() - started)
        return found


def give_up(model: Model, items: Sequence[QueuedImage], why: Rejection) -> None:
    """Give *why* to those of *items* that have no outcome, and let none of them come to the engine."""
    for item in items:
        model.discard(item)
    settle(items, [why] * len(items))


def note_stages(context: RequestContext, items: Sequence[QueuedImage], outcomes: Sequence[Outcome]) -> None:
    """Keep in *context* where the time of *items* went, which became *outcomes*."""
    for item, outcome in zip(items, outcomes, strict=True):
        if item.decode_seconds is not None:
            context.record_stage("decode", item.decode_seconds, item.arrived)
        if isinstance(outcome, Prediction):
            began = item.arrived + outcome.queue_seconds
            context.record_stage("queue", outcome.queue_seconds, began)
            context.record_stage("infer", outcome.infer_seconds, began + outcome.infer_seconds)
