"""One model's batching: put in a decoded image, and its item will have its outcome.

One waiting line, one engine thread, and a watchdog that notices when that thread dies or hangs.
Then everything that waits is refused at once and `dead` stays true: a server that cannot answer
must not look healthy.
"""

import asyncio
import contextlib
import logging

from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_statistics import LatencyTable
from sopdeploy_service.inference.model_worker import ModelWorker
from sopdeploy_service.inference.queue import QueuedImage, RequestQueue, settle
from sopdeploy_service.inference.results import DRAINING, ENGINE_DEAD, Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

JOIN_SECONDS = 2.0  # what a batch at work gets to end after the line was closed
WATCH_SECONDS = 1.0  # at most, from one look at the engine to the next
HANGS_AFTER_SECONDS = 4.0  # at least; a clock that jumps or a machine that stalls is no hung engine
HANGS_AFTER_TIMES = 20  # as long as such a batch usually takes

log = logging.getLogger("sopdeploy.engine")


class Batcher:
    """Every method but `put` is called on the event loop; *name* is the model's, for its metrics."""

    def __init__(self, name: str, inference: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.dead = False
        self.largest = largest_batch(inference.runtime, settings)
        self._closed_with: Rejection | None = None
        self._timeout = settings.engine_timeout_seconds
        self._latency = LatencyTable(inference.timings)
        self._line = RequestQueue(max_delay=settings.max_queue_delay_ms / 1000)
        self._engine = ModelWorker(
            inference.runtime,
            self._line,
            self._latency,
            metrics.of(name),
            outputs=[output.name for output in inference.bundle.manifest.outputs],
            largest=self.largest,
        )
        self._watchdog: asyncio.Task[None] | None = None

    def seconds(self, images: int) -> float:
        """Return the measured engine time of so many *images* in full batches."""
        return self._latency.queue(images, self.largest)

    def start(self) -> None:
        """Start the engine thread and its watchdog."""
        self._engine.start(asyncio.get_running_loop(), self._engine_ended)
        self._watchdog = asyncio.create_task(self._watch())

    def put(self, item: QueuedImage) -> Rejection | None:
        """Let *item* wait for its batch, or return why it cannot; any thread may call this."""
        return None if self._line.put(item) else self._closed_with or DRAINING

    def discard(self, item: QueuedImage) -> None:
        """Take *item* out if it still waits."""
        self._line.discard(item)

    def close(self, refusal: Rejection) -> None:
        """Let nothing more in and give *refusal* to every item without an outcome."""
        if self._closed_with is not None:
            return
        self._closed_with = refusal
        items = [*self._line.close(), *self._engine.at_work()]
        settle(items, [refusal] * len(items))

    async def stop(self) -> None:
        """Close and let the engine thread end."""
        self.close(DRAINING)
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        await asyncio.to_thread(self._engine.join, 0.0 if self.dead else JOIN_SECONDS)

    def _engine_ended(self) -> None:
        if self._closed_with is None:
            self._die("the engine thread has ended")

    def _die(self, reason: str) -> None:
        log.critical("%s; nothing more can be answered", reason)
        self.dead = True
        self.close(ENGINE_DEAD)

    def _patience(self) -> float:
        """Return for how many seconds the batch at work may run before the engine counts as hung."""
        if self._timeout is not None:
            return self._timeout
        usual = self._latency.batch(self._engine.size())
        return max(HANGS_AFTER_SECONDS, HANGS_AFTER_TIMES * usual)

    async def _watch(self) -> None:
        while not self.dead:
            patience, busy = self._patience(), self._engine.busy_for()
            if busy > patience:
                self._die(f"a batch runs for more than {patience:.1f} s")
            await asyncio.sleep(min(WATCH_SECONDS, max(patience - busy, patience / 20)))
