"""A loaded bundle with its queue, worker thread and statistics.

A watchdog notices when the worker thread dies or hangs. Then every queued image is rejected at once and
`dead` stays true: a server that cannot predict must not look healthy.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_statistics import LatencyTable, ModelStatistics
from sopdeploy_service.inference.model_worker import ModelWorker
from sopdeploy_service.inference.queue import QueuedImage, RequestQueue, settle
from sopdeploy_service.inference.results import DRAINING, ENGINE_DEAD, Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

JOIN_SECONDS = 2.0  # how long a running batch may take to end after the queue was closed
WATCH_SECONDS = 1.0  # longest time between two checks of the worker
MIN_HANG_SECONDS = 4.0  # a clock that jumps or a machine that stalls is no hung worker
HANG_FACTOR = 20  # a batch counts as hung after this many times its usual seconds

log = logging.getLogger("sopdeploy.engine")


class Model:
    """A bundle being served; every method but `put` is called on the event loop."""

    def __init__(self, name: str, loaded: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.loaded = loaded
        self.bundle = loaded.bundle
        self.labels = loaded.bundle.labels
        self.version = loaded.bundle.manifest.id
        self.largest_batch = largest_batch(loaded.runtime, settings)
        self.statistics = ModelStatistics()
        self.dead = False
        self.queue = RequestQueue(max_delay=settings.max_queue_delay_ms / 1000)
        self._closed_with: Rejection | None = None
        self._timeout = settings.engine_timeout_seconds
        self.latency = LatencyTable(loaded.timings)
        self._worker = ModelWorker(
            loaded.runtime,
            self.queue,
            self.latency,
            metrics.of(name),
            outputs=[output.name for output in loaded.bundle.manifest.outputs],
            max_batch=self.largest_batch,
        )
        self._watchdog: asyncio.Task[None] | None = None
        self._users = 0
        self.unused = asyncio.Event()
        self.unused.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep `unused` cleared while a request uses the model."""
        self._users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self.unused.set()

    def start(self) -> None:
        """Start the worker thread and its watchdog."""
        self._worker.start(asyncio.get_running_loop(), self._worker_ended)
        self._watchdog = asyncio.create_task(self._watch())

    def put(self, item: QueuedImage) -> Rejection | None:
        """Queue *item*; return a rejection if the model is closed. Thread-safe."""
        return None if self.queue.put(item) else self._closed_with or DRAINING

    def close(self, rejection: Rejection) -> None:
        """Accept no more images and give *rejection* to every image without an outcome."""
        if self._closed_with is None:
            self._closed_with = rejection
            batches = tuple(self._worker.in_flight)
            items = [*self.queue.close(), *(item for batch in batches for item in batch.items)]
            settle(items, [rejection] * len(items))

    async def stop(self) -> None:
        """Close the model and end its worker thread."""
        self.close(DRAINING)
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        await asyncio.to_thread(self._worker.join, 0.0 if self.dead else JOIN_SECONDS)

    def _worker_ended(self) -> None:
        if self._closed_with is None:
            self._declare_dead("the model worker has ended")

    def _declare_dead(self, reason: str) -> None:
        log.critical("%s; the model rejects every image from now on", reason)
        self.dead = True
        self.close(ENGINE_DEAD)

    async def _watch(self) -> None:
        while not self.dead:
            # The worker thread changes both.
            started, batches = self._worker.started, tuple(self._worker.in_flight)
            images = len(batches[0].items) if batches and started is not None else 0
            seconds = 0.0 if started is None else time.monotonic() - started
            limit = self._timeout
            if limit is None:
                limit = max(MIN_HANG_SECONDS, HANG_FACTOR * self.latency.batch_seconds(images))
            if seconds > limit:
                self._declare_dead(f"a batch has been running for more than {limit:.1f} s")
            await asyncio.sleep(min(WATCH_SECONDS, max(limit - seconds, limit / 20)))
