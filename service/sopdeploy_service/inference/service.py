"""Everything behind the HTTP layer: admission, decoder threads and the model registry.

An image is admitted or rejected, decoded in a thread, and queued at its model. The decoder sets the outcome
of an invalid image, otherwise the model worker does, or the deadline if it is earlier. An invalid image never
shares a batch with the images of other requests.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ImageError
from sopdeploy_service.images.decode import Decoded, DecodePool, EncodedImage, PoolClosedError
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage, call_soon, settle
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DECODER_FAILED,
    DRAINING,
    ENGINE_DEAD,
    TOO_LATE,
    Outcome,
    Prediction,
    RejectedError,
    Rejection,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.settings import Settings

MAX_RETRY_SECONDS = 60

Images: TypeAlias = Sequence[EncodedImage] | NDArray[np.uint8]
State: TypeAlias = Literal["ok", "draining", "no_model", "engine_dead", "loop_blocked"]
CreateRegistry: TypeAlias = Callable[[Settings, Metrics], ModelRegistry]


class Observer(Protocol):
    """Observes the outcomes of requests, between `start` and `stop` of a service."""

    def info(self) -> dict[str, Any]:
        """Return additional fields of `/info`."""
        ...

    def start(self) -> None:
        """Start, after the models."""
        ...

    def observe(
        self,
        model: Model,
        context: RequestContext,
        items: Sequence[QueuedImage],
        images: Images,
        outcomes: Sequence[Outcome],
    ) -> None:
        """Observe the *outcomes* of a request before its response; *items* have the decoded pixels."""
        ...

    async def stop(self) -> None:
        """Stop, before the models."""
        ...


class Service:
    """Runs inference from `start` to `stop`, once. Every method is called on the event loop."""

    def __init__(
        self,
        loaded: Mapping[str, LoadedModel],
        settings: Settings,
        store: BundleStore | None = None,
        create_registry: CreateRegistry | None = None,
    ) -> None:
        """Serve *loaded* in this process or, with *create_registry*, the models of another registry."""
        self.settings = settings
        self.metrics = Metrics()
        self.active_requests = 0  # counted by the middleware
        if create_registry is None:
            self.registry = ModelRegistry(loaded, settings, self.metrics, store)
        else:
            self.registry = create_registry(settings, self.metrics)
        self.observers: list[Observer] = []
        self.fetches = asyncio.Semaphore(settings.url_fetches)
        # Few threads: a JSON parser holds the interpreter lock.
        self.parsers = ThreadPoolExecutor(settings.parsers, thread_name_prefix="parser")
        self.admitted = 0  # images; a request whose images are not known yet counts as one
        self._decoders = DecodePool(make_decoder(settings), settings.decoders)
        self.metrics.decoders.set(settings.decoders)
        self.metrics.queue_depth.set_function(lambda: self.admitted)
        self._draining = True

    @property
    def state(self) -> State:
        """The health: `ok`, `draining` (also before `start`), `no_model` or `engine_dead`."""
        models = self.registry.models()
        if any(model.dead for model in models):
            return "engine_dead"
        if self._draining:
            return "draining"
        return "ok" if models else "no_model"

    async def start(self) -> None:
        """Start the threads and accept requests."""
        await self.registry.start()
        for observer in self.observers:
            observer.start()
        self._decoders.start()
        self._draining = False

    def drain(self, *, abort: bool = False) -> None:
        """Reject new requests; finish those already admitted.

        With *abort*, also reject every image without an outcome.
        """
        self._draining = True
        if abort:
            self.registry.close(DRAINING)

    async def stop(self) -> None:
        """End the threads."""
        self.drain(abort=True)
        self._decoders.stop()
        self.parsers.shutdown(wait=False, cancel_futures=True)
        for observer in self.observers:
            await observer.stop()
        await self.registry.stop()

    def check_admission(self, model: Model, deadline: float) -> None:
        """Raise `RejectedError` if a request cannot be admitted or meet its *deadline*.

        Call it before the body is read.
        """
        if model.dead:
            raise RejectedError(ENGINE_DEAD)
        if self._draining:
            raise RejectedError(DRAINING)
        self._check_queue(model, 1)
        # An idle worker is always tried: an estimate that rejects everything could never be corrected.
        images = self.admitted + model.queue.images_elsewhere
        if images:
            end = time.monotonic() + model.latency.total_seconds(images + 1, model.largest_batch)
            if end > deadline:
                raise RejectedError(TOO_LATE)

    @contextmanager
    def admitting(self, model: Model, images: int = 1) -> Iterator[None]:
        """Count *images* as queued during the block; raises `RejectedError` if the queue is full."""
        self._check_queue(model, images)
        self.admitted += images
        try:
            yield
        finally:
            self.admitted -= images

    def _check_queue(self, model: Model, images: int) -> None:
        if self.admitted + images > self.settings.queue_size:
            waiting = self.admitted + model.queue.images_elsewhere
            seconds = math.ceil(model.latency.total_seconds(waiting, model.largest_batch))
            retry_after = min(MAX_RETRY_SECONDS, max(1, seconds))
            raise RejectedError(Rejection("queue_full", 429, "the queue is full; retry later", retry_after))

    async def infer(
        self,
        model: Model,
        images: Images,
        deadline: float,
        context: RequestContext,
        *,
        features: bool = False,
    ) -> list[Outcome]:
        """Run *model*, which must be in use, on encoded images or on a tensor (n, H, W, 3) uint8.

        Returns the outcome of each image, in order. *deadline* is a time of `time.monotonic`; *features*
        requests the output of class activation maps. Cancelling the call removes its images from the queue.
        Raises `RejectedError` if the queue is full, the rate limit of *context* is exceeded, or the deadline
        has passed.
        """
        started = time.monotonic()
        with self.admitting(model, len(images)):
            context.images += len(images)
            if context.rate_limit is not None:
                context.rate_limit.spend(len(images))
            items = self._create_items(images, deadline, context, features=features)
            outcomes = await self._run(model, items, images, deadline - started)
        stages = _record_stages(context, items, outcomes)
        model.statistics.record(outcomes, stages, time.monotonic() - started)
        if any(outcome is DEADLINE for outcome in outcomes):
            raise RejectedError(DEADLINE)
        for observer in self.observers:
            observer.observe(model, context, items, images, outcomes)
        return outcomes

    def _create_items(
        self, images: Images, deadline: float, context: RequestContext, *, features: bool
    ) -> list[QueuedImage]:
        loop = asyncio.get_running_loop()
        return [
            QueuedImage(
                outcome=loop.create_future(), deadline=deadline, trace=context.trace, features=features
            )
            for _ in images
        ]

    async def _run(
        self, model: Model, items: list[QueuedImage], images: Images, seconds: float
    ) -> list[Outcome]:
        """Queue *items* with their *images* and wait for all outcomes, at most *seconds*."""
        timer = asyncio.get_running_loop().call_later(seconds, model.queue.reject, items, DEADLINE)
        try:
            for item, image in zip(items, images, strict=True):
                self.submit(model, item, image)
            return [await item.outcome for item in items]
        except asyncio.CancelledError:
            model.queue.reject(items, CLIENT_GONE)
            raise
        finally:
            timer.cancel()

    def submit(self, model: Model, item: QueuedImage, image: EncodedImage | NDArray[np.uint8]) -> None:
        """Queue a decoded *image* at *model*, or decode it first in a decoder thread."""
        if not isinstance(image, EncodedImage):
            item.image = image
            rejection = model.queue.put(item)
            if rejection is not None:
                settle([item], [rejection])
            return
        loop = asyncio.get_running_loop()

        def on_done(result: Decoded | Exception, seconds: float) -> None:  # in a decoder thread
            self.metrics.decode_seconds.inc(seconds)
            rejection: Rejection | None = DECODER_FAILED
            if isinstance(result, Decoded):
                ended = time.monotonic()
                item.image, item.warnings, item.size = result
                item.decode_seconds, item.arrived = ended - item.arrived, ended
                self.metrics.stage("decode", item.decode_seconds)
                rejection = model.queue.put(item)
            elif isinstance(result, PoolClosedError):
                rejection = DRAINING
            elif isinstance(result, ImageError):
                rejection = Rejection.of(result)
            if rejection is not None:
                call_soon(loop, settle, [item], [rejection])

        preprocess = model.bundle.manifest.preprocess
        self._decoders.submit(image, preprocess, on_done, cancelled=item.outcome.done)


def _record_stages(
    context: RequestContext, items: Sequence[QueuedImage], outcomes: Sequence[Outcome]
) -> dict[str, float]:
    """Record the stages of *items*; return the seconds of the slowest image in each stage."""
    slowest: dict[str, float] = {}
    for item, outcome in zip(items, outcomes, strict=True):
        stages = []
        if item.decode_seconds is not None:
            stages.append(("decode", item.decode_seconds, item.arrived))
        if isinstance(outcome, Prediction):
            begun = item.arrived + outcome.queue_seconds
            stages.append(("queue", outcome.queue_seconds, begun))
            stages.append(("infer", outcome.infer_seconds, begun + outcome.infer_seconds))
        for stage, seconds, ended in stages:
            context.record_stage(stage, seconds, ended)
            slowest[stage] = max(seconds, slowest.get(stage, 0.0))
    return slowest
