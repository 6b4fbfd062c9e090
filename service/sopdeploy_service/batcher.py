"""The event loop's side of batching: hand in one decoded image, wait for its outcome.

One waiting line, one engine thread, and a watchdog that notices when that thread dies or hangs.
Then everything that waits is refused at once and `dead` stays true: a server that cannot answer
must not look healthy.
"""

import asyncio
import contextlib
import logging

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.engine import Engine, settle
from sopdeploy_service.metrics import Metrics
from sopdeploy_service.open_inference import Inference, largest_batch
from sopdeploy_service.outcome import DRAINING, ENGINE_DEAD, Outcome, Refusal
from sopdeploy_service.settings import Settings
from sopdeploy_service.waiting import Item, WaitingLine

JOIN_SECONDS = 2.0  # what a batch at work gets to end after the line was closed

log = logging.getLogger("sopdeploy.engine")


class Batcher:
    """Every method is called on the event loop."""

    def __init__(self, inference: Inference, settings: Settings, metrics: Metrics) -> None:
        self.dead = False
        self._closed_with: Refusal | None = None
        self._timeout = settings.engine_timeout_seconds
        self._line = WaitingLine(max_delay=settings.max_queue_delay_ms / 1000)
        self._engine = Engine(
            inference.runtime,
            self._line,
            output=inference.bundle.manifest.outputs[0].name,
            largest=largest_batch(inference.runtime, settings),
            metrics=metrics,
        )
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def seconds_per_image(self) -> float:
        """Return the measured engine time of one image; 0 before the first batch."""
        return self._engine.seconds_per_image

    def start(self) -> None:
        """Start the engine thread and its watchdog."""
        self._engine.start(asyncio.get_running_loop(), self._engine_ended)
        self._watchdog = asyncio.create_task(self._watch())

    async def submit(self, image: NDArray[np.uint8], deadline: float) -> Outcome:
        """Return the outcome of *image* (H, W, 3); cancelling this takes it out of the line."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        item = Item(image=image, outcome=future, deadline=deadline)
        if not self._line.put(item):
            return self._closed_with or DRAINING
        try:
            return await future
        finally:
            self._line.discard(item)

    def close(self, refusal: Refusal) -> None:
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

    async def _watch(self) -> None:
        while not self.dead:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            if self._engine.busy_for() > self._timeout:
                self._die(f"a batch runs for more than {self._timeout:g} s")
