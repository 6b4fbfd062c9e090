"""A model that is served: its queue, and the thread that owns its runtime, forms batches and runs them.

An idle worker takes the images that are queued (`request_queue`), and does not wait for more.
Images that arrive while a batch runs join the next batch.

Some runtimes can have two batches in flight. If a full batch is queued, the worker then begins
it before the previous one has ended: the device does not wait for Python. A batch that is not
full stays in the queue, where it can still grow until the device is free.

A batch that raises is halved until the image that causes it fails alone. An output that is not
finite fails only the image it belongs to. If the thread dies, or a watchdog notices that it
hangs, every image is rejected at once and `is_down` stays true: a server that cannot predict
must not look healthy.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import WORKER_THREAD
from sopdeploy.bundle.decision import have_answers
from sopdeploy.bundle.manifest import EMBEDDING, LOGITS
from sopdeploy.bundle.probes import Outputs
from sopdeploy_service.inference import results
from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model import ImageResult, Model, RuntimeFacts, settle
from sopdeploy_service.inference.request_queue import QueuedImage, RequestQueue, call_soon
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import (
    DeviceLostError,
    OverlappingRuntime,
    Runtime,
    is_out_of_memory,
)
from sopdeploy_service.settings import Settings

MIN_HANG_SECONDS = 4.0  # tolerates a clock that jumps and a machine that stalls
HANG_FACTOR = 20  # a batch counts as hung after this many times its usual seconds
_JOIN_SECONDS = 2.0  # how long a running batch may take to end after the queue was closed
WATCH_SECONDS = 1.0  # longest time between two checks of the thread
# A check that is later than this comes after a pause of the process, as by Ctrl-Z
PAUSE_SECONDS = 1.0

_Pixels: TypeAlias = Sequence[NDArray[np.uint8]]
OutputsOrError: TypeAlias = dict[str, NDArray[np.float32]] | HttpError  # of one image

log = logging.getLogger("sopdeploy.inference")


@dataclass(slots=True)
class _Batch:
    """A batch in flight; *wait* returns its outputs. If *wait* is None, `_run_images` runs the batch."""

    images: list[QueuedImage]
    wait: Callable[[], Outputs] | None = None


class LocalModel(Model):
    """A bundle whose runtime is in this process; public methods are called on the event loop."""

    def __init__(
        self, name: str, loaded: LoadedModel, settings: Settings, metrics: Metrics
    ) -> None:
        runtime = loaded.runtime
        manifest = loaded.bundle.manifest
        facts = RuntimeFacts(runtime.name, runtime.device, largest_batch(runtime, settings))
        super().__init__(name, loaded.bundle, facts, loaded.timings, settings)
        self._is_dead = False

        # What requests meet: the queue, the metrics.
        self.queue = RequestQueue(batch_seconds=self.pace.batch_seconds)
        metrics.create_series(name)
        self._metrics = metrics

        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None

        # The following is for the thread only, until it has ended. The watchdog and `close` read
        # `_in_flight` and `_batch_started`.
        self._runtime = runtime
        # The same runtime if it can have two batches in flight.
        self._overlapping = runtime if isinstance(runtime, OverlappingRuntime) else None

        self._outputs = tuple(output.name for output in manifest.outputs)
        self._outputs_without_features = tuple(
            name for name in self._outputs if name != EMBEDDING
        )

        self._must_check_device = False  # because every image of the last batch failed
        self._in_flight: list[_Batch] = []  # oldest first
        # When the oldest batch got the device to itself.
        self._batch_started: float | None = None

    @property
    def is_down(self) -> bool:
        """Whether a batch hung or the thread failed."""
        return self._is_dead

    async def run(
        self,
        pixels: NDArray[np.uint8],
        deadline: float,
        *,
        features: bool = False,
    ) -> ImageResult:
        """Queue the image, and wait until its batch has run."""
        # Queue the image, with a timer for its deadline.
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ImageResult | HttpError] = loop.create_future()
        image = QueuedImage(pixels, deadline, partial(settle, future), features)
        timer = loop.call_at(deadline, image.settle, results.DEADLINE)
        self.queue.put(image)

        try:
            result = await future
        finally:
            timer.cancel()
            self.queue.remove(image)  # after a cancellation; otherwise it has left the queue

        if isinstance(result, HttpError):
            raise RejectedError(result)
        return result

    @property
    def num_running(self) -> int:
        """How many images are in batches in flight."""
        return sum(len(batch.images) for batch in tuple(self._in_flight))

    def start(self) -> None:
        """Start the thread that runs batches, and its watchdog."""
        loop = asyncio.get_running_loop()
        run = partial(self._run_batches, loop)
        self._thread = threading.Thread(target=run, name=WORKER_THREAD, daemon=True)
        self._thread.start()
        self._watchdog = loop.create_task(self._watch())

    def close(self, reason: HttpError) -> None:
        """Accept no more images and give *reason* to every image without an outcome."""
        if self.queue.closed_with is None:
            # The queue first: the thread begins no other batch. Outcomes of those in flight
            # come too late.
            images = self.queue.close(reason)

            for batch in tuple(self._in_flight):
                images += batch.images
            for image in images:
                image.settle(reason)

    async def stop(self) -> None:
        """Close the model, end its thread and release its runtime, unless a batch does not end."""
        self.close(results.DRAINING)

        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog

        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 0.0 if self._is_dead else _JOIN_SECONDS)
            # A batch that has not ended still uses the memory; after a hang, `close` may hang,
            # too.
            if not self._is_dead and not self._thread.is_alive():
                await asyncio.to_thread(self._runtime.close)

    def hang_seconds(self, num_images: int) -> float:
        """Compute after how many seconds a batch of *num_images* counts as hung."""
        usual = self.pace.batch_seconds(num_images)
        return max(MIN_HANG_SECONDS, HANG_FACTOR * usual)

    async def _watch(self) -> None:
        """Declare the model dead if a batch hangs; look again when the oldest counts as hung, or sooner."""
        resumed = 0.0  # time of the end of the last pause; the seconds before do not count
        while not self._is_dead:
            # Read the batch before its start. The thread sets the start of the next batch, then
            # removes the batch in front of it. So a batch may be read with a later start, which
            # is harmless, but never with an earlier one, with which it would seem to hang.
            batches = tuple(self._in_flight)
            started = self._batch_started

            # Without a batch in flight, `check_device` may run, on a single image.
            num_images = len(batches[0].images) if batches else 0
            seconds = 0.0 if started is None else time.monotonic() - max(started, resumed)
            limit = self.hang_seconds(num_images)

            if seconds > limit:
                self._declare_dead(f"a batch has been running for more than {limit:.1f} s")

            # Sleep until the batch would count as hung. A check that is late comes after a
            # pause.
            until_hung = max(limit - seconds, limit / 20)  # not 0, which would be a busy loop
            due = time.monotonic() + min(WATCH_SECONDS, until_hung)
            await asyncio.sleep(due - time.monotonic())
            if time.monotonic() > due + PAUSE_SECONDS:
                resumed = time.monotonic()

    def _declare_dead(self, reason: str) -> None:
        """Log *reason* and reject every image from now on, unless the model was closed."""
        if self.queue.closed_with is None:
            log.critical("%s; the model rejects every image from now on", reason)
            self._is_dead = True
            self.close(results.RUNTIME_DEAD)

    def _run_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches and pass their results to *loop* until the queue is closed or the thread fails."""
        try:
            while True:
                # Wait for a batch if none is in flight. If all images of the last one failed,
                # the device is checked first.
                if not self._in_flight:
                    if self._must_check_device:
                        self._batch_started = time.monotonic()  # for the watchdog
                        check_device(self._runtime, self.bundle.manifest.image_shape)
                        self._batch_started = None
                        self._must_check_device = False

                    if not self._begin_batch():  # the queue is closed
                        break

                # Begin a second batch, but none after one that failed: first, the device is
                # checked.
                if self._overlapping is not None and not self._must_check_device:
                    self._begin_batch(only_full=True)

                # Complete the oldest batch.
                batch = self._in_flight[0]
                pixels = [image.pixels for image in batch.images]
                names = self._names_of(batch.images)
                rows = run_bisected(partial(self._run_images, batch, names), pixels, names)
                started = cast(float, self._batch_started)

                # If every image failed, the device may be lost.
                ended = time.monotonic()
                self._must_check_device = all(
                    row in (results.INFERENCE_FAILED, results.OUT_OF_MEMORY) for row in rows
                )

                # Set before the batch is removed, see `_watch`: the next one now has the device
                # to itself.
                self._batch_started = ended if len(self._in_flight) > 1 else None
                del self._in_flight[0]

                call_soon(loop, self._settle_and_count, batch.images, rows, started, ended)

                # The wait for the next batch must not keep their memory.
                del (batch, pixels, rows)

        except BaseException:  # logged here because nothing else sees it
            log.critical("the model worker ends", exc_info=True)
        finally:
            call_soon(loop, self._declare_dead, "the model worker has ended")

    def _begin_batch(self, *, only_full: bool = False) -> bool:
        """Wait for a batch and begin it; return False if the queue is closed.

        With *only_full*, never wait: begin a full batch, or return False if too few images are
        queued.
        """
        images = self.queue.take(self.largest_batch, only_full=only_full)
        if not images:
            return False
        batch = _Batch(images)

        if self._batch_started is None:
            self._batch_started = time.monotonic()

        # It is added before it begins: the watchdog must see a call that hangs.
        self._in_flight.append(batch)
        if self._overlapping is not None:
            # After an error, `wait` stays None: `_run_images` tries again, and its errors count.
            with contextlib.suppress(Exception):
                pixels = [image.pixels for image in images]
                batch.wait = self._overlapping.begin(pixels, self._names_of(images))
        return True

    def _names_of(self, images: Sequence[QueuedImage]) -> Sequence[str]:
        """Return the names of the outputs that *images* need."""
        return (
            self._outputs
            if any(image.features for image in images)
            else self._outputs_without_features
        )

    def _run_images(self, batch: _Batch, names: Sequence[str], images: _Pixels) -> Outputs:
        """Return the outputs *names* of *images*, perhaps with others.

        The first call is for all images of *batch*, which may have begun already; later ones
        are for parts.
        """
        if batch.wait is not None:
            wait = batch.wait
            batch.wait = None
            return wait()

        if self._overlapping is not None:
            return self._overlapping.begin(images, names)()
        return self._runtime.run(np.stack(images))

    def _settle_and_count(
        self,
        images: Sequence[QueuedImage],
        rows: Sequence[OutputsOrError],
        started: float,
        ended: float,
    ) -> None:
        """Settle *images*, a batch, and count it, on the event loop while the thread runs the next batch."""
        # Give each image its row of the outputs.
        waited = [started - image.arrived for image in images]
        for image, row, seconds in zip(images, rows, waited, strict=True):
            if isinstance(row, HttpError):
                image.settle(row)
                continue

            image.settle(
                ImageResult(row, {"queue": seconds, "infer": ended - started}, len(images))
            )

        # Count the batch, for the estimates of waiting times and for the metrics.
        self.pace.record(len(images), ended - started)

        # A device is busy even with batches of one image, but could run more images in full ones.
        # Their share tells how much of its capacity is in use.
        share = len(images) / self.largest_batch
        full_seconds = share * self.pace.batch_seconds(self.largest_batch)
        self._metrics.device_busy.add(min(ended - started, full_seconds))
        self._metrics.count_batch(self.name, waited, started, ended)


def check_device(runtime: Runtime, image_shape: tuple[int, ...]) -> None:
    """Run a blank image after a batch that failed; raise `DeviceLostError` if this fails, too.

    If the images caused the errors of the batch, a blank one can run. The text of an error does
    not tell.
    """
    try:
        runtime.run(np.zeros((1, *image_shape), np.uint8))
    except Exception as error:  # whatever a library raises on a lost device
        raise DeviceLostError(f"after a failed batch, a blank image failed: {error}") from error


def run_bisected(
    run: Callable[[_Pixels], Outputs], images: _Pixels, names: Sequence[str]
) -> list[OutputsOrError]:
    """Run *images* (H, W, 3) as one batch; halve a batch that fails, down to single images.

    Returns each image's row of the outputs *names*, or an `HttpError`. Raises `DeviceLostError`
    at once.
    """
    try:
        return _split_rows(run(images), names, len(images))
    except DeviceLostError:
        raise
    except Exception as error:  # a runtime may raise anything
        if is_out_of_memory(error):
            log.warning("out of memory for a batch of %d", len(images))
            reason = results.OUT_OF_MEMORY
        else:
            log.exception("inference failed on a batch of %d", len(images))
            reason = results.INFERENCE_FAILED

    # A part that failed is halved, down to the image that fails alone.
    if len(images) == 1:
        return [reason]
    halves = images[: len(images) // 2], images[len(images) // 2 :]
    return [row for half in halves for row in run_bisected(run, half, names)]


def _split_rows(
    outputs: Outputs, names: Sequence[str], num_images: int
) -> list[OutputsOrError]:
    """Split the *outputs* of a batch into rows with *names*; reject a row if one of them is not finite.

    Logits may be minus infinity, as `have_answers` says.
    """
    finite = np.ones(num_images, dtype=bool)

    for name in names:
        values = outputs[name]
        if len(values) != num_images:
            raise ValueError(f"output {name!r} has {len(values)} rows for {num_images} images")
        rows = values.reshape(num_images, -1)
        finite &= have_answers(rows) if name == LOGITS else np.isfinite(rows).all(axis=1)

    return [
        {name: outputs[name][row] for name in names} if finite[row] else results.NONFINITE
        for row in range(num_images)
    ]
