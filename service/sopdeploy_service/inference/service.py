"""Everything behind the HTTP layer: admission, decoder threads and the model registry.

An image is admitted or rejected, decoded in a thread, and queued at its model. The decoder sets the outcome
of an invalid image, otherwise the model worker does, or the deadline if it is earlier. An invalid image never
shares a batch with the images of other requests.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from prometheus_client import generate_latest

from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.decoders import Decoders, upload_budget
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DECODERS_BUSY,
    DRAINING,
    RUNTIME_DEAD,
    TOO_LATE,
    HttpError,
    Outcome,
    Prediction,
    RejectedError,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.settings import (
    DECODERS_BESIDE_CPU_INFERENCE,
    Settings,
    cores_within_quota,
    decoders_per_process,
)

MAX_RETRY_SECONDS = 60
PARSERS = 2  # threads; a JSON parser holds the interpreter lock

Images: TypeAlias = Sequence[EncodedImage] | NDArray[np.uint8]
State: TypeAlias = Literal["ok", "draining", "runtime_dead"]
CreateRegistry: TypeAlias = Callable[[Settings, Metrics], ModelRegistry]
CollectMetrics: TypeAlias = Callable[[], Awaitable[bytes]]

log = logging.getLogger("sopdeploy.service")


class ObservedRequest(NamedTuple):
    """The images of a request and their outcomes, before its response; the items have the decoded pixels."""

    model: Model
    context: RequestContext
    items: Sequence[QueuedImage]
    images: Images
    outcomes: Sequence[Outcome]

    def predicted(self) -> Iterator[tuple[EncodedImage | NDArray[np.uint8], NDArray[np.uint8], Prediction]]:
        """Yield each predicted image as it was sent, the pixels that the model got, and its prediction."""
        for item, image, outcome in zip(self.items, self.images, self.outcomes, strict=True):
            if isinstance(outcome, Prediction):
                yield image, item.image, outcome


Observe: TypeAlias = Callable[[ObservedRequest], None]


class Service:
    """Runs inference from `start` to `stop`, once. Every method is called on the event loop."""

    def __init__(
        self,
        loaded: Mapping[str, LoadedModel],
        settings: Settings,
        create_registry: CreateRegistry | None = None,
        collect_metrics: CollectMetrics | None = None,
    ) -> None:
        """Serve *loaded* or, with *create_registry*, the models of another registry.

        *collect_metrics* formats the metrics of all processes of the server; empty if they are not known.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.active_requests = 0  # counted by the middleware
        self.upload_bytes = 0  # of the bodies of active requests, counted by `read_body`
        if create_registry is None:
            self.registry = ModelRegistry(loaded, settings, self.metrics)
        else:
            self.registry = create_registry(settings, self.metrics)
        self._collect_metrics = collect_metrics
        self.observers: list[Observe] = []
        self.parsers = ThreadPoolExecutor(PARSERS, thread_name_prefix="parser")
        self.admitted = 0  # images; a request whose images are not known yet counts as one
        self.max_upload_bytes = upload_budget(settings)
        self.decoders = self._create_decoders()
        self.metrics.queue_depth.set_function(lambda: self.admitted)
        self.metrics.upload_bytes.set_function(lambda: self.upload_bytes)
        self._draining = True

    def _create_decoders(self) -> Decoders:
        """Create the decoder threads."""
        threads = self._count_decoders()
        self.metrics.decoders.set(threads)
        decode = partial(make_decoder(self.settings), formats=self.settings.formats)
        return Decoders(threads, self.settings, self.metrics, decode)

    def _count_decoders(self) -> int:
        if self.settings.decoders != "auto":
            return self.settings.decoders
        if all(model.loaded.runtime.device == "cpu" for model in self.registry.models()):
            return DECODERS_BESIDE_CPU_INFERENCE
        return decoders_per_process(cores_within_quota(), 1)

    @property
    def state(self) -> State:
        """The health: `ok`, `draining` (also before `start`) or `runtime_dead`."""
        if any(model.dead for model in self.registry.models()):
            return "runtime_dead"
        return "draining" if self._draining else "ok"

    async def collect_metrics(self) -> bytes:
        """Format the metrics of all processes of this server for Prometheus, or those of this process."""
        page = b"" if self._collect_metrics is None else await self._collect_metrics()
        return page or generate_latest(self.metrics.registry)

    async def start(self) -> None:
        """Start the threads and accept requests."""
        await self.registry.start()
        self.decoders.start()
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
        self.decoders.stop()
        self.parsers.shutdown(wait=False, cancel_futures=True)
        await self.registry.stop()

    def check_admission(self, model: Model, deadline: float) -> None:
        """Raise `RejectedError` if a request cannot be admitted or meet its *deadline*.

        Call it before the body is read.
        """
        if model.dead:
            raise RejectedError(RUNTIME_DEAD)
        if self._draining:
            raise RejectedError(DRAINING)
        self._check_queue(model, 1)
        # An idle worker is always tried: an estimate that rejects everything could never be corrected.
        if self.admitted:
            end = time.monotonic() + model.latency.total_seconds(self.admitted + 1, model.largest_batch)
            if end > deadline:
                raise RejectedError(TOO_LATE)

    @contextmanager
    def admitting(self, model: Model) -> Iterator[None]:
        """Count a request as one image during the block; raises `RejectedError` if the queue is full."""
        self._check_queue(model, 1)
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    def _check_queue(self, model: Model, num_images: int) -> None:
        if self.admitted + num_images > self.settings.queue_size:
            seconds = math.ceil(model.latency.total_seconds(self.admitted, model.largest_batch))
            retry_after = min(MAX_RETRY_SECONDS, max(1, seconds))
            raise RejectedError(HttpError("queue_full", 429, "the queue is full; retry later", retry_after))

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
        requests the embedding. Cancelling the call removes its images from the queue.
        Raises `RejectedError` if the queue is full, the rate limit of *context* is exceeded, or the deadline
        has passed.
        """
        started, loop = time.monotonic(), asyncio.get_running_loop()
        self._check_queue(model, len(images))
        context.num_images += len(images)
        if context.rate_limit is not None:
            context.rate_limit.spend(len(images))
        items = [
            QueuedImage(outcome=loop.create_future(), deadline=deadline, features=features) for _ in images
        ]
        timer = loop.call_later(deadline - started, self._miss_deadline, model, items)
        self.admitted += len(images)
        try:
            for item, image in zip(items, images, strict=True):
                self._submit(model, item, image)
            outcomes = [await item.outcome for item in items]
        except asyncio.CancelledError:
            model.queue.reject(items, CLIENT_GONE)
            raise
        finally:
            self.admitted -= len(images)
            timer.cancel()
        _record_stages(context, items, outcomes)
        for outcome in outcomes:
            if isinstance(outcome, HttpError) and outcome in {DEADLINE, DECODERS_BUSY}:
                raise RejectedError(outcome)
        request = ObservedRequest(model, context, items, images, outcomes)
        for observe in self.observers:
            observe(request)
        return outcomes

    def _miss_deadline(self, model: Model, items: Sequence[QueuedImage]) -> None:
        for item in items:
            model.queue.reject([item], item.late)

    def _submit(self, model: Model, item: QueuedImage, image: EncodedImage | NDArray[np.uint8]) -> None:
        """Queue a decoded *image* at *model*, or decode it first in a decoder thread."""
        if isinstance(image, EncodedImage):
            self.decoders.put(model, item, image)
            return
        item.image = image
        reason = model.queue.put(item)
        if reason is not None:
            item.settle(reason)


def _record_stages(
    context: RequestContext, items: Sequence[QueuedImage], outcomes: Sequence[Outcome]
) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        if item.decode_seconds is not None:
            context.record_stage("decode", item.decode_seconds)
        if isinstance(outcome, Prediction):
            context.record_stage("queue", outcome.queue_seconds)
            context.record_stage("infer", outcome.infer_seconds)
