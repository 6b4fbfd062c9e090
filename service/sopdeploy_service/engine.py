"""The one thread that owns the runtime: takes a batch, runs it, hands the outcomes to the loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from sopdeploy_service.isolate import Row, run_isolated
from sopdeploy_service.metrics import Metrics
from sopdeploy_service.outcome import NONFINITE, Answered, Outcome, Refusal
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.waiting import Item, WaitingLine

SMOOTHING = 0.2  # share of the newest batch in the measured seconds per image

log = logging.getLogger("sopdeploy.engine")


class Engine:
    """Runs batches of at most *largest* items until its line is closed.

    *on_end* is called on the event loop when the thread has ended, whatever ended it.
    """

    def __init__(
        self, runtime: Runtime, line: WaitingLine, *, output: str, largest: int, metrics: Metrics
    ) -> None:
        self.seconds_per_image = 0.0  # measured; 0 before the first batch
        self._runtime = runtime
        self._line = line
        self._output = output
        self._largest = largest
        self._metrics = metrics
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
            while batch := self._line.take(self._largest):
                self._work(batch, loop)
        except BaseException:  # the last word of this thread; the service ends the process
            log.critical("the engine thread ends", exc_info=True)
        finally:
            call_soon(loop, on_end)

    def _work(self, batch: list[Item], loop: asyncio.AbstractEventLoop) -> None:
        started = time.monotonic()
        self._batch, self._since = batch, started
        rows = run_isolated(self._runtime.run, [item.image for item in batch], self._output)
        ended = time.monotonic()
        self._batch, self._since = [], None
        self._measure(batch, rows, started, ended)
        outcomes = [
            row if isinstance(row, Refusal) else Answered(row, started - item.arrived, ended - started)
            for item, row in zip(batch, rows, strict=True)
        ]
        call_soon(loop, settle, batch, outcomes)

    def _measure(self, batch: list[Item], rows: list[Row], started: float, ended: float) -> None:
        each = (ended - started) / len(batch)
        old = self.seconds_per_image
        self.seconds_per_image = each if old == 0 else old + SMOOTHING * (each - old)
        self._metrics.batch(len(batch), started, ended)
        for item in batch:
            self._metrics.stage("queue", started - item.arrived)
        self._metrics.nonfinite(sum(row is NONFINITE for row in rows))


def settle(items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
    """Give each of *items* its outcome; those that nobody waits for are passed over. On the loop."""
    for item, outcome in zip(items, outcomes, strict=True):
        if not item.outcome.done():
            item.outcome.set_result(outcome)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: object) -> None:
    """Run *function* on *loop*, from another thread; nothing where the loop is already closed."""
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:
        log.debug("the event loop is closed; an outcome is dropped")
