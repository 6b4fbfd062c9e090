"""A loaded bundle with its queue, worker thread and latency estimates.

A watchdog notices when the worker thread dies or hangs. Then every queued image is rejected at once and
`dead` stays true: a server that cannot predict must not look healthy.
"""

import asyncio
import contextlib
import logging
import threading
import time

from sopdeploy.decision import Decision
from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_worker import LatencyTable, ModelWorker, RequestQueue, settle
from sopdeploy_service.inference.results import DRAINING, RUNTIME_DEAD, HttpError
from sopdeploy_service.observability.metrics import Metrics, drift_window
from sopdeploy_service.settings import Settings

_JOIN_SECONDS = 2.0  # how long a running batch may take to end after the queue was closed

WATCH_SECONDS = 1.0  # longest time between two checks of the worker

log = logging.getLogger("sopdeploy.inference")


class Model:
    """A bundle being served; every method is called on the event loop."""

    is_loaded = True

    def __init__(self, name: str, loaded: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.loaded = loaded
        self.bundle = loaded.bundle
        self.labels = loaded.bundle.labels
        self.decision = loaded.bundle.manifest.decision or Decision()
        self.thresholds, self.rejection = self.decision.thresholds, self.decision.rejection
        self.logits = loaded.bundle.manifest.outputs[0].name
        self.top_k = settings.classes_per_image(multi_label=self.thresholds is not None)
        self.version = loaded.bundle.manifest.id
        self.largest_batch = largest_batch(loaded.runtime, settings)
        self.dead = False
        self.queue = RequestQueue(max_delay=settings.max_queue_delay_ms / 1000)
        self._timeout = settings.batch_timeout_seconds
        self.latency = LatencyTable(loaded.timings)
        self._worker = ModelWorker(
            loaded.runtime,
            self.queue,
            self.latency,
            metrics.of(name),
            outputs=[output.name for output in loaded.bundle.manifest.outputs],
            max_batch=self.largest_batch,
            drift=drift_window(loaded.bundle),
        )
        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self.users = 0  # requests
        self.unused = asyncio.Event()
        self.unused.set()

    def start(self) -> None:
        """Start the worker thread and its watchdog."""
        self._thread = threading.Thread(
            target=self._worker.run,
            args=(asyncio.get_running_loop(), self._on_thread_end),
            name="model_worker",
            daemon=True,
        )
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch())

    def close(self, reason: HttpError) -> None:
        """Accept no more images and give *reason* to every image without an outcome."""
        if self.queue.closed_with is None:
            batches = tuple(self._worker.in_flight)
            items = [*self.queue.close(reason), *(item for batch in batches for item in batch.items)]
            settle(items, [reason] * len(items))

    def continue_from(self, previous: "Model") -> None:
        """Take over the drift window of *previous*, which has the same bundle."""
        self._worker.drift = previous._worker.drift

    async def stop(self) -> None:
        """Close the model, end its worker thread and release its runtime."""
        self.close(DRAINING)
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 0.0 if self.dead else _JOIN_SECONDS)
            if not self.dead and not self._thread.is_alive():  # otherwise a batch may still use the memory
                await asyncio.to_thread(self.loaded.runtime.close)

    def _on_thread_end(self) -> None:
        """Declare the model dead if its worker thread has ended without being told to."""
        if self.queue.closed_with is None:
            self._declare_dead("the model worker has ended")

    def _declare_dead(self, reason: str) -> None:
        """Log *reason* and reject every image from now on."""
        log.critical("%s; the model rejects every image from now on", reason)
        self.dead = True
        self.close(RUNTIME_DEAD)

    def hang_seconds(self, num_images: int) -> float:
        """Compute after how many seconds a batch of *num_images* counts as hung."""
        return self._timeout or self.latency.hang_seconds(num_images)

    async def _watch(self) -> None:
        while not self.dead:
            # The worker thread changes both attributes at any time.
            started, batches = self._worker.started, tuple(self._worker.in_flight)
            images = len(batches[0].items) if batches and started is not None else 0
            seconds = 0.0 if started is None else time.monotonic() - started
            limit = self.hang_seconds(images)
            if seconds > limit:
                self._declare_dead(f"a batch has been running for more than {limit:.1f} s")
            await asyncio.sleep(min(WATCH_SECONDS, max(limit - seconds, limit / 20)))
