"""The one thread that owns a runtime: takes a batch, runs it, hands the outputs to the loop.

Where the runtime can have two batches under way and a full one waits, that is begun before the one before it
has ended, so the device goes from one to the next while Python is busy with what comes before and after. One
that is not full stays in the line: until the device is free, it may still grow.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.probes import Outputs
from sopdeploy_service.inference.bisect_batch import Row, run_isolated
from sopdeploy_service.inference.model_statistics import LatencyTable
from sopdeploy_service.inference.queue import QueuedImage, RequestQueue, call_soon, settle
from sopdeploy_service.inference.results import NONFINITE, Outcome, Prediction, Ranking, Rejection
from sopdeploy_service.observability.metrics import ModelMetrics
from sopdeploy_service.runtime.base import OutOfMemoryError, Overlapping, Runtime


class Stack:
    """Room for *largest* images; for one thread, and for runtimes that keep nothing of what they get."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._room: NDArray[np.uint8] | None = None

    def of(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return *images* (H, W, 3), at most *largest*, as (n, H, W, 3); it holds until the next call."""
        first = images[0]
        if len(images) == 1:
            return first[None]
        if self._room is None or self._room.shape[1:] != first.shape:
            self._room = np.empty((self._largest, *first.shape), first.dtype)
        return np.stack(images, out=self._room[: len(images)])


Images = Sequence[NDArray[np.uint8]]


class Runner:
    """Runs batches of at most *largest* images on *runtime*; for one thread."""

    def __init__(self, runtime: Runtime, largest: int) -> None:
        self._runtime = runtime
        self._device = runtime if isinstance(runtime, Overlapping) else None
        self._stack = Stack(largest)

    @property
    def overlaps(self) -> bool:
        """Return whether a batch may be begun while another is under way."""
        return self._device is not None

    def begin(self, images: Images) -> Callable[[], Outputs]:
        """Begin a batch; what is returned gives its outputs, or raises what went wrong, once."""
        if self._device is None:
            return partial(self.run, images)
        try:
            return self._device.begin(images)
        except Exception as problem:  # told when it is this batch's turn: another one is under way
            return partial(fail, problem)

    def run(self, images: Images) -> Outputs:
        """Return the outputs of a batch."""
        if self._device is None:
            return self._runtime.run(self._stack.of(images))
        return self._device.begin(images)()


def fail(problem: Exception) -> Outputs:
    """Raise *problem*."""
    raise problem


SMALLER_SECONDS = 60.0  # how long batches stay halved after the device had no memory for one

log = logging.getLogger("sopdeploy.engine")


@dataclass(slots=True)
class Batch:
    """Items under way; when it has begun, *outputs* waits for theirs or raises what went wrong, once."""

    items: list[QueuedImage]
    outputs: Callable[[], Outputs] = field(init=False)

    @property
    def images(self) -> Images:
        """Return their images."""
        return [item.image for item in self.items]


class ModelWorker:
    """Runs batches of at most *largest* items until its line is closed.

    *on_end* is called on the event loop when the thread has ended, whatever ended it.
    """

    def __init__(
        self,
        runtime: Runtime,
        line: RequestQueue,
        latency: LatencyTable,
        metrics: ModelMetrics,
        *,
        outputs: Sequence[str],
        largest: int,
    ) -> None:
        self._runner = Runner(runtime, largest)
        self._line = line
        self._latency = latency
        self._metrics = metrics
        self._outputs = tuple(outputs)
        self._whole = self._largest = largest
        self._smaller_until = 0.0
        self._at_work: list[Batch] = []  # oldest first
        self._since: float | None = None  # when the oldest had the device to itself
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

    def size(self) -> int:
        """Return how many images the batch at work has; 0 while idle."""
        return next((len(batch.items) for batch in tuple(self._at_work)), 0)

    def at_work(self) -> Sequence[QueuedImage]:
        """Return the items of every batch under way."""
        return [item for batch in tuple(self._at_work) for item in batch.items]

    def _live(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        try:
            while self._at_work or self._begin(self._line.take(self._limit())):
                if self._runner.overlaps:
                    self._begin(self._line.take_full(self._limit()))
                self._end(loop)
        except BaseException:  # the last word of this thread; the service ends the process
            log.critical("the engine thread ends", exc_info=True)
        finally:
            call_soon(loop, on_end)

    def _limit(self) -> int:
        if self._largest < self._whole and time.monotonic() >= self._smaller_until:
            self._largest = min(self._whole, self._largest * 2)
            self._smaller_until = time.monotonic() + SMALLER_SECONDS
        return self._largest

    def _begin(self, items: list[QueuedImage]) -> bool:
        """Begin a batch of *items*; return whether there are any."""
        if items:
            batch = Batch(items)
            self._since = self._since or time.monotonic()
            self._at_work.append(batch)  # the watchdog must see it before it begins, where it may hang
            batch.outputs = self._runner.begin(batch.images)
        return bool(items)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the oldest batch and hand it to the loop."""
        batch = self._at_work[0]
        begun = [batch.outputs]
        rows = run_isolated(lambda some: self._outputs_of(some, begun), batch.images, self._outputs)
        started, ended = self._since or 0.0, time.monotonic()
        del self._at_work[0]
        self._since = ended if self._at_work else None
        call_soon(loop, self._finish, batch.items, rows, started, ended)

    def _finish(
        self, batch: Sequence[QueuedImage], rows: Sequence[Row], started: float, ended: float
    ) -> None:
        """Settle and count *batch*, on the loop: the engine thread is already with the next one."""
        settle(batch, self._outcomes(batch, rows, started, ended - started))
        self._latency.note(len(batch), ended - started)
        self._metrics.batch([started - item.arrived for item in batch], self._whole, started, ended)
        self._metrics.nonfinite(sum(row is NONFINITE for row in rows))
        sharing = [item.trace for item in batch if item.trace is not None]
        if sharing:
            sharing[0].record_batch(sharing, started, ended)

    def _outcomes(
        self, batch: Sequence[QueuedImage], rows: Sequence[Row], started: float, seconds: float
    ) -> list[Outcome]:
        logits: list[NDArray[np.float32]] = []
        ranking = Ranking(logits)
        outcomes: list[Outcome] = []
        for item, row in zip(batch, rows, strict=True):
            if isinstance(row, Rejection):
                outcomes.append(row)
                continue
            queued = started - item.arrived
            outcomes.append(Prediction(row, queued, seconds, len(batch), ranking, len(logits), item.warnings))
            logits.append(row[self._outputs[0]])
        return outcomes

    def _outputs_of(self, images: Images, begun: list[Callable[[], Outputs]]) -> Outputs:
        """Return the outputs of *images*: of what was *begun* the first time, then run anew."""
        try:
            return begun.pop()() if begun else self._runner.run(images)
        except OutOfMemoryError:
            self._largest = max(1, len(images) // 2)
            self._smaller_until = time.monotonic() + SMALLER_SECONDS
            raise
