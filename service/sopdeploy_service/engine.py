"""The one thread that owns a runtime: takes a batch, runs it, hands the outputs to the loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.isolate import Row, run_isolated
from sopdeploy_service.latency import LatencyTable
from sopdeploy_service.metrics import ModelMetrics
from sopdeploy_service.outcome import NONFINITE, Answered, Outcome, Refusal
from sopdeploy_service.ranking import Ranking
from sopdeploy_service.runtime.base import OutOfMemoryError, Runtime
from sopdeploy_service.stacking import Stack
from sopdeploy_service.waiting import Item, WaitingLine, call_soon, settle

SMALLER_SECONDS = 60.0  # how long batches stay halved after the device had no memory for one

log = logging.getLogger("sopdeploy.engine")


class Engine:
    """Runs batches of at most *largest* items until its line is closed.

    *on_end* is called on the event loop when the thread has ended, whatever ended it.
    """

    def __init__(
        self,
        runtime: Runtime,
        line: WaitingLine,
        latency: LatencyTable,
        metrics: ModelMetrics,
        *,
        outputs: Sequence[str],
        largest: int,
    ) -> None:
        self._runtime = runtime
        self._line = line
        self._latency = latency
        self._metrics = metrics
        self._outputs = tuple(outputs)
        self._whole = self._largest = largest
        self._stack = Stack(largest)
        self._smaller_until = 0.0
        self._batch: list[Item] = []
        self._since: float | None = None  # when the batch at work began
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        """Start the thread; outcomes go to futures of *loop*."""
        self._thread = threading.Thread(target=self._live, args=(loop, on_end), name="engine", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def busy_for(self) -> float:
        """Return for how many seconds the batch at work has been running; 0 while idle."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def at_work(self) -> Sequence[Item]:
        """Return the items of the batch at work."""
        return tuple(self._batch)

    def _live(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        try:
            while batch := self._line.take(self._size()):
                self._work(batch, loop)
        except BaseException:  # the last word of this thread; the service ends the process
            log.critical("the engine thread ends", exc_info=True)
        finally:
            call_soon(loop, on_end)

    def _size(self) -> int:
        if self._largest < self._whole and time.monotonic() >= self._smaller_until:
            self._largest = min(self._whole, self._largest * 2)
            self._smaller_until = time.monotonic() + SMALLER_SECONDS
        return self._largest

    def _work(self, batch: list[Item], loop: asyncio.AbstractEventLoop) -> None:
        started = time.monotonic()
        self._batch, self._since = batch, started
        rows = run_isolated(self._run, [item.image for item in batch], self._outputs)
        ended = time.monotonic()
        self._batch, self._since = [], None
        call_soon(loop, self._finish, batch, rows, started, ended)

    def _finish(self, batch: Sequence[Item], rows: Sequence[Row], started: float, ended: float) -> None:
        """Settle and count *batch*, on the loop: the engine thread is already with the next one."""
        settle(batch, self._outcomes(batch, rows, started, ended - started))
        self._latency.note(len(batch), ended - started)
        self._metrics.batch([started - item.arrived for item in batch], self._whole, started, ended)
        self._metrics.nonfinite(sum(row is NONFINITE for row in rows))
        sharing = [item.trace for item in batch if item.trace is not None]
        if sharing:
            sharing[0].batch(sharing, started, ended)

    def _outcomes(
        self, batch: Sequence[Item], rows: Sequence[Row], started: float, seconds: float
    ) -> list[Outcome]:
        logits: list[NDArray[np.float32]] = []
        ranking = Ranking(logits)
        outcomes: list[Outcome] = []
        for item, row in zip(batch, rows, strict=True):
            if isinstance(row, Refusal):
                outcomes.append(row)
                continue
            queued = started - item.arrived
            outcomes.append(Answered(row, queued, seconds, len(batch), ranking, len(logits), item.warnings))
            logits.append(row[self._outputs[0]])
        return outcomes

    def _run(self, images: Sequence[NDArray[np.uint8]]) -> Mapping[str, NDArray[np.float32]]:
        try:
            return self._runtime.run(self._stack.of(images))
        except OutOfMemoryError:
            self._largest = max(1, len(images) // 2)
            self._smaller_until = time.monotonic() + SMALLER_SECONDS
            raise
