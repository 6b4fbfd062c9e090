"""The threads that decode images, in three lanes by the estimated cost of the image.

Any decoder thread takes a `light` image. A `photo` and a `large` image wait in queues of their own, for
threads of lower priority: a few for photos, one for large images, of which the whole server decodes one at a
time. So light images pass, and the memory of decoded images is bounded by the lanes.
"""

import fcntl
import logging
import math
import os
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.cost import Cost
from sopdeploy_service.images.decode import Decode, EncodedImage, keep_freed_blocks
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage, call_soon
from sopdeploy_service.inference.results import (
    DEADLINE,
    DECODE_TIMEOUT,
    DECODER_FAILED,
    DECODERS_BUSY,
    HttpError,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.device_memory import memory_limit, resident_bytes, trim_heaps
from sopdeploy_service.settings import LARGE_BODY_SHARE, Settings

_MIB = 1 << 20
LIGHT = Cost(16 * _MIB, 40)  # at most: a JPEG of 3.5 megapixels
PHOTO = Cost(128 * _MIB, 350)  # a JPEG of 24 megapixels
NICENESS = 10  # of the threads for photos and large images
USED_SHARE = 3 / 4  # of the memory; the rest is for batches, JSON, and pages that the allocator keeps
UPLOAD_SHARE = 1 / 8  # of the memory, at most, for request bodies
PHOTO_LANE, LARGE_LANE = 1, 2
MAX_WAITING_LARGE = 8  # large images; one more gets 503
LEAST_BYTES = 64 * _MIB  # for a large image

log = logging.getLogger("sopdeploy.service")


class _Job(NamedTuple):
    """An *image* to decode; *item* then joins the queue of *model*."""

    model: Model
    item: QueuedImage
    image: EncodedImage


class Plan(NamedTuple):
    """Number of threads for photos in each process, and bytes of the largest image that is decoded."""

    photos: int
    largest: int


def upload_budget(settings: Settings, processes: int = 1) -> int:
    """Return how many bytes of request bodies one of *processes* may hold."""
    share = int(memory_limit() * UPLOAD_SHARE / processes)
    return min(settings.max_upload_bytes, max(share, math.ceil(settings.max_body_bytes / LARGE_BODY_SHARE)))


def decode_budget(settings: Settings, at_rest: int, processes: int = 1) -> int:
    """Return the bytes for decoded images in all *processes*, whose server occupies *at_rest* bytes."""
    if settings.max_decode_bytes is not None:
        return settings.max_decode_bytes
    uploads = upload_budget(settings, processes) * processes
    return int(memory_limit() * USED_SHARE) - at_rest - uploads


def plan_lanes(budget: int, decoders: int, processes: int = 1) -> Plan:
    """Divide *budget* bytes among *processes* with *decoders* threads each.

    Light images get their share first. A third of the rest is for photos, as far as it suffices for whole
    threads; what remains is for the one large image.
    """
    rest = budget - processes * decoders * LIGHT.memory
    photos = min(decoders, max(0, rest // 3) // (processes * PHOTO.memory))
    largest = rest - processes * photos * PHOTO.memory
    if largest < LEAST_BYTES:
        log.warning(
            "%d MB of memory remain for decoded images; images that need more than %d MB are rejected",
            budget // 10**6, LEAST_BYTES // 10**6,
        )  # fmt: skip
    return Plan(photos, max(largest, LEAST_BYTES))


class _OtherLaneError(Exception):
    """Ends the decoding of an image, before a pixel is decoded, that belongs to the lane *number*."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Decoders:
    """Decodes queued images and queues them at their models, from `start` to `stop`."""

    def __init__(
        self,
        threads: int,
        settings: Settings,
        metrics: Metrics,
        decode: Decode,
    ) -> None:
        """Decode with *decode*; use *threads* for light images."""
        self._threads, self._settings, self._metrics, self._decode = threads, settings, metrics, decode
        self._lanes: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(3)]
        self._counts: list[int] = []
        self._running: dict[int, tuple[float, QueuedImage]] = {}  # by thread
        self._slot: int | None = None
        self.plan: Plan | None = None

    def share(self, budget: int, processes: int, slot: int) -> None:
        """Divide *budget* bytes with other *processes*; *slot* is a file that each of them has opened."""
        self.plan, self._slot = plan_lanes(budget, self._threads, processes), slot

    def start(self) -> None:
        """Start the threads; without `share`, the budget is what this process may use."""
        if self.plan is None:
            self.plan = plan_lanes(decode_budget(self._settings, resident_bytes()), self._threads)
        log.debug("lanes of decoders", extra=self.plan._asdict())
        self._metrics.max_decode_bytes.set(self.plan.largest)
        keep_freed_blocks(2 * self._threads)
        self._counts = [self._threads, self.plan.photos, 1]
        for number, count in enumerate(self._counts):
            for index in range(count):  # daemons: a decoder that hangs cannot block an exit
                name = f"decoder_{number}_{index}"
                threading.Thread(target=self._run, args=(number,), name=name, daemon=True).start()

    def stop(self) -> None:
        """End the threads."""
        for lane, count in zip(self._lanes, self._counts, strict=False):
            for _ in range(count):
                lane.put(None)

    def put(self, model: Model, item: QueuedImage, image: EncodedImage) -> None:
        """Queue *image* for decoding; *item* then joins the queue of *model*."""
        self._lanes[0].put(_Job(model, item, image))

    def reject_overdue(self, seconds: float) -> bool:
        """Reject the images whose decoding takes longer than *seconds*; return whether there are any."""
        overdue = [item for began, item in list(self._running.values()) if time.monotonic() - began > seconds]
        for item in overdue:
            item.settle(DECODE_TIMEOUT)
        return bool(overdue)

    def _run(self, lane: int) -> None:
        """Decode the images of *lane* in this thread until None is queued."""
        if lane:
            with suppress(OSError):  # of this thread only, on Linux
                os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        while (job := self._lanes[lane].get()) is not None:
            self._running[threading.get_ident()] = time.monotonic(), job.item
            try:
                reason = self._decode_and_queue(lane, job)
            except _OtherLaneError as moved:
                reason = self._move(job, moved.number)
            del self._running[threading.get_ident()]
            if reason is not None:
                call_soon(job.item.outcome.get_loop(), job.item.settle, reason)
            if lane == LARGE_LANE:
                Image.core.clear_cache()  # type: ignore[attr-defined]
                trim_heaps()
            del job, reason  # an idle thread must not keep an image or a model alive

    def _move(self, job: _Job, lane: int) -> HttpError | None:
        """Queue *job* in *lane*; return the error if too many large images wait there."""
        if lane == LARGE_LANE and self._lanes[lane].qsize() >= MAX_WAITING_LARGE:
            return DECODERS_BUSY
        job.item.late = DECODERS_BUSY
        self._lanes[lane].put(job)
        return None

    def _decode_and_queue(self, lane: int, job: _Job) -> HttpError | None:
        """Decode the image of *job* and queue its item; return the error of an image that is not queued."""
        model, item, image = job
        if item.outcome.done() or model.queue.closed_with is not None:
            return model.queue.closed_with
        with ExitStack() as stack:
            if lane == LARGE_LANE and self._slot is not None:
                fcntl.flock(self._slot, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, self._slot, fcntl.LOCK_UN)
            started = time.monotonic()
            self._running[threading.get_ident()] = started, item
            try:
                decoded = self._decode(
                    image, model.bundle.manifest.preprocess, admit=partial(self._admit, lane)
                )
                item.image, item.warnings = decoded
            except ImageError as error:
                return HttpError.of(error)
            except _OtherLaneError:
                raise
            except Exception:  # a bug fails its own image, not the others of the request
                log.exception("the decoder failed on an image of %d bytes", len(image.body))
                return DECODER_FAILED
            finally:
                ended = time.monotonic()
                self._metrics.decode_seconds.inc(ended - started)
        item.late = DEADLINE
        item.decode_seconds, item.arrived = ended - item.arrived, ended
        self._metrics.stage("decode", item.decode_seconds)
        return model.queue.put(item)

    def _admit(self, lane: int, cost: Cost) -> None:
        """Raise `_OtherLaneError` if an image of this *cost* belongs to another lane than *lane*.

        Raises `ImageError` if it needs more memory than any image may.
        """
        plan = self.plan
        if plan is None or _fits(cost, LIGHT):
            return
        if cost.memory > plan.largest:
            needed, limit = -(-cost.memory // 10**6), plan.largest // 10**6
            message = (
                f"decoding needs {needed} MB, the limit is {limit} MB (max_decode_bytes); send it smaller"
            )
            raise ImageError(message, code="too_much_memory", status=413)
        proper = PHOTO_LANE if plan.photos and _fits(cost, PHOTO) else LARGE_LANE
        if proper != lane:
            raise _OtherLaneError(proper)


def _fits(cost: Cost, limit: Cost) -> bool:
    return cost.memory <= limit.memory and cost.ms <= limit.ms
