"""The thread that owns a runtime, forms batches and runs them.

If the runtime can have two batches in flight and a full one is queued, the worker begins it before the
previous one has ended, so that the device does not wait for Python. A batch that is not full stays in the
queue, where it can still grow until the device is free.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.probes import Outputs
from sopdeploy_service.inference.bisect_batch import Row, run_bisected
from sopdeploy_service.inference.model_statistics import LatencyTable
from sopdeploy_service.inference.queue import QueuedImage, RequestQueue, call_soon, settle
from sopdeploy_service.inference.results import NONFINITE, Outcome, Prediction, Ranking, Rejection
from sopdeploy_service.observability.metrics import ModelMetrics
from sopdeploy_service.runtime.base import OutOfMemoryError, OverlappingRuntime, Runtime

SMALLER_SECONDS = 60.0  # how long batches stay halved after the device ran out of memory

Images = Sequence[NDArray[np.uint8]]

log = logging.getLogger("sopdeploy.engine")


@dataclass(slots=True)
class _Batch:
    """A batch in flight: *wait* returns its outputs, *error* is why it did not begin."""

    items: list[QueuedImage]
    wait: Callable[[], Outputs] | None = None
    error: Exception | None = None


class ModelWorker:
    """Runs batches of at most *max_batch* images until *queue* is closed."""

    def __init__(
        self,
        runtime: Runtime,
        queue: RequestQueue,
        latency: LatencyTable,
        metrics: ModelMetrics,
        *,
        outputs: Sequence[str],
        max_batch: int,
    ) -> None:
        self._runtime = runtime
        self._overlapping = runtime if isinstance(runtime, OverlappingRuntime) else None
        self._queue = queue
        self._latency = latency
        self._metrics = metrics
        self._outputs = tuple(outputs)
        self._max_batch = self._limit = max_batch
        self._limited_until = 0.0
        self.in_flight: list[_Batch] = []  # oldest first
        self.started: float | None = None  # when the oldest batch got the device to itself
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        """Start the thread; call *on_end* on *loop* when it ends, for whatever reason."""
        self._thread = threading.Thread(
            target=self._run, args=(loop, on_end), name="model_worker", daemon=True
        )
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        try:
            while self.in_flight or self._begin(self._queue.take(self._current_limit())):
                if self._overlapping is not None:
                    self._begin(self._queue.take_full(self._current_limit()))
                self._complete_oldest(loop)
        except BaseException:  # logged here because nothing else sees it; the service then ends the process
            log.critical("the model worker ends", exc_info=True)
        finally:
            call_soon(loop, on_end)

    def _current_limit(self) -> int:
        if self._limit < self._max_batch and time.monotonic() >= self._limited_until:
            self._limit = min(self._max_batch, self._limit * 2)
            self._limited_until = time.monotonic() + SMALLER_SECONDS
        return self._limit

    def _begin(self, items: list[QueuedImage]) -> bool:
        """Begin a batch of *items*; return False if there are none."""
        if items:
            batch = _Batch(items)
            self.started = self.started or time.monotonic()
            self.in_flight.append(batch)  # before it begins: the watchdog must see a call that hangs
            if self._overlapping is not None:
                try:
                    batch.wait = self._overlapping.begin([item.image for item in items])
                except Exception as error:  # handled when this batch is the oldest: another one is in flight
                    batch.error = error
        return bool(items)

    def _complete_oldest(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the outputs of the oldest batch and hand them to the event loop."""
        batch = self.in_flight[0]
        images = [item.image for item in batch.items]
        rows = run_bisected(lambda part: self._run_images(part, batch), images, self._outputs)
        started, ended = self.started or 0.0, time.monotonic()
        del self.in_flight[0]
        self.started = ended if self.in_flight else None
        call_soon(loop, self._settle, batch.items, rows, started, ended)

    def _run_images(self, images: Images, batch: _Batch) -> Outputs:
        """Wait for the begun *batch* the first time; later run *images* anew."""
        wait, error, batch.wait, batch.error = batch.wait, batch.error, None, None
        try:
            if error is not None:
                raise error
            if self._overlapping is None:
                return self._runtime.run(np.stack(images))
            return (wait or self._overlapping.begin(images))()
        except OutOfMemoryError:
            self._limit = max(1, len(images) // 2)
            self._limited_until = time.monotonic() + SMALLER_SECONDS
            raise

    def _settle(self, items: list[QueuedImage], rows: list[Row], started: float, ended: float) -> None:
        """Settle and count a batch. Runs on the event loop while the worker runs the next batch."""
        logits: list[NDArray[np.float32]] = []
        ranking = Ranking(logits)
        outcomes: list[Outcome] = []
        for item, row in zip(items, rows, strict=True):
            if isinstance(row, Rejection):
                outcomes.append(row)
                continue
            waited, seconds = started - item.arrived, ended - started
            outcomes.append(Prediction(row, waited, seconds, len(items), ranking, len(logits), item.warnings))
            logits.append(row[self._outputs[0]])
        settle(items, outcomes)
        self._latency.record(len(items), ended - started)
        self._metrics.batch([started - item.arrived for item in items], self._max_batch, started, ended)
        self._metrics.nonfinite.inc(sum(row is NONFINITE for row in rows))
        traces = [item.trace for item in items if item.trace is not None]
        if traces:
            traces[0].record_batch(traces, started, ended)
