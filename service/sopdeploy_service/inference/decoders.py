"""Decode images in child processes: children for light images, and others for large ones.

Light children have little memory and normal priority. The header of an image tells how many
pixels its decoder holds (`sopdeploy.images.cost`): a JPEG of 12 megapixels that is decoded at a
quarter of its sides is light. Children for large images have more memory and low priority; they
also get what a light child fails on for time or memory. So light images pass large ones, and
the memory of all children is limited.

A child can also end without any fault of its image, as when the system runs out of memory. An
image whose child ends by another cause than its own limits is therefore decoded once more, by a
child for large images.

What no decoder accepts is refused by its first bytes, before any queue. An image that a decoder
refuses by its header, or whose header tells nothing, is light: that takes little.

Clients share the children for large images, and wait for them in turn (`shared_children`).
"""

import asyncio
import functools
import logging
import math
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

from sopdeploy.base.environment import memory_limit
from sopdeploy.errors import ImageError
from sopdeploy.images.cost import Cost, estimate_cost
from sopdeploy.images.formats import detect_format, empty_error
from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy.images.preprocess import Pixels, Preprocess
from sopdeploy_service.decoding import child, pool
from sopdeploy_service.decoding.child import PIXEL_BYTES, ChildOptions
from sopdeploy_service.decoding.pool import (
    ChildEnded,
    DecoderProcess,
    Reply,
    Request,
    shared_template,
)
from sopdeploy_service.inference import results
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.inference.shared_children import Group, SharedChildren
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.device_memory import resident_bytes
from sopdeploy_service.settings import LARGE_BODY_SHARE, MAX_UPLOAD_BYTES, Settings

_MIB = 1 << 20
# Of an image for a light child, at most: memory, pixels, bytes of the file
LIGHT_MEMORY = 80 * _MIB
LIGHT_PIXELS = 3_000_000
LIGHT_BODY = 2_000_000
# CPU time of a light child: twice that of ordinary files, which other load slows down. A WebP
# takes up to 24 ns per pixel, a PNG 15, a JPEG with one scan less, and 13 to 20 ns per byte.
LIGHT_SECONDS = 0.03
SECONDS_PER_PIXEL = 40e-9
SECONDS_PER_BYTE = 20e-9
HEADER_SECONDS = 0.001  # of a file whose header is read, and of each other one in addition
# Limits of a light JPEG with one scan
PROPORTIONAL_BODY = 6_000_000
PROPORTIONAL_PIXELS = 25_000_000
OWN_MEMORY = 8 * _MIB  # of an idle child, beside the pages that it shares with its template
LARGE_MEMORY = 384 * _MIB  # for each child for large images, if there are several
DECODE_SECONDS = 20.0  # after which an image gets 422
NICENESS = 10  # of children for large images
# Of the memory, for all that is planned; the rest is for batches, JSON, and pages that the allocator
# keeps
USED_SHARE = 3 / 4
UPLOAD_SHARE = 1 / 8  # of the memory, at most, for request bodies
MAX_COPY_BYTES = 1 << 26
SLOW_SECONDS = (
    10.0  # for which a client is slow, after an image that was too slow for a light child
)
MAX_SLOW_CLIENTS = 10_000

log = logging.getLogger("sopdeploy.service")

_Result = TypeVar("_Result")


class DecodedImage(NamedTuple):
    """What `Decoded` has, and the seconds of the stages `decode_queue` (the wait) and `decode`."""

    pixels: Pixels
    warnings: tuple[str, ...]
    stage_seconds: Mapping[str, float]


class Plan(NamedTuple):
    """Number of children for light and for large images, and bytes of memory of one for large images."""

    light: int
    large: int
    large_memory: int


def upload_budget(settings: Settings, num_processes: int = 1) -> int:
    """Return how many bytes of request bodies one of *num_processes* may hold."""
    # At least enough for one body of the largest size
    least = math.ceil(settings.max_body_bytes / LARGE_BODY_SHARE)

    return min(
        MAX_UPLOAD_BYTES,
        max(least, int(memory_limit() * UPLOAD_SHARE / num_processes)),
    )


def decode_budget(settings: Settings, at_rest: int, num_processes: int = 1) -> int:
    """Return the bytes for the children of one of *num_processes*; without images, the server has *at_rest* bytes."""
    uploads = upload_budget(settings, num_processes) * num_processes
    return (int(memory_limit() * USED_SHARE) - at_rest - uploads) // num_processes


def plan_children(budget: int, max_children: int, max_pixels: int) -> Plan:
    """Divide *budget* bytes among children for light images and at least one child for large ones.

    There are at most *max_children* of each kind. Each light child gets `LIGHT_MEMORY`; the
    children for large images share the rest, up to the need of *max_pixels*. Of 1000 MiB, 4 light
    children get 80 MiB each and one for large images gets 640, each beside 8 MiB of its own.
    """
    # Give light children what they need, and leave enough for one child for large images.
    light_bytes = LIGHT_MEMORY + OWN_MEMORY  # of one child
    light = max(1, min(max_children, budget // light_bytes - 1))
    rest = budget - light * light_bytes

    # Divide the rest among the children for large images.
    large = max(1, min(max_children, rest // (LARGE_MEMORY + OWN_MEMORY)))
    largest_need = max_pixels * PIXEL_BYTES  # of any image
    # At least `LIGHT_MEMORY`: even if *max_pixels* is small, the file of an image can be large.
    large_memory = max(LIGHT_MEMORY, min(rest // large - OWN_MEMORY, largest_need))

    # Warn if there is too little memory for all children, or for a photo of a phone (10 megapixels).
    usual_need = min(LARGE_MEMORY // 2, largest_need)
    if light < max_children or large_memory < usual_need:
        log.warning(
            "the memory suffices for %d of %d decoders, and for large images that need %d MB",
            light, max_children, large_memory // 10**6,
        )  # fmt: skip
    return Plan(light, large, large_memory)


def light_seconds(length: int, cost: Cost | None, max_pixels: int) -> float:
    """Return the CPU time that a light child gives a file of *length* bytes and *cost*; 0 if it is large."""
    if not _is_decoded(cost, max_pixels):
        return LIGHT_SECONDS

    if cost.pixels > LIGHT_PIXELS or cost.is_slow:
        return 0.0
    seconds = LIGHT_SECONDS + cost.pixels * SECONDS_PER_PIXEL

    if not cost.is_proportional:
        return seconds if length <= LIGHT_BODY else 0.0
    if length > PROPORTIONAL_BODY or cost.encoded > PROPORTIONAL_PIXELS:
        return 0.0
    return seconds + length * SECONDS_PER_BYTE


def known_seconds(length: int, cost: Cost | None, max_pixels: int) -> float:
    """Return the seconds that a child needs for a file of *length* bytes and *cost*, for `Pace`."""
    if not _is_decoded(cost, max_pixels):
        return HEADER_SECONDS

    seconds = HEADER_SECONDS + cost.pixels * SECONDS_PER_PIXEL
    return seconds + length * SECONDS_PER_BYTE if cost.is_proportional else seconds


def _is_decoded(cost: Cost | None, max_pixels: int) -> TypeGuard[Cost]:
    """Tell whether a decoder reads more than the header of a file.

    It does not if the file has too many pixels, or if the header does not tell the cost: such a
    file is usually damaged.
    """
    return cost is not None and cost.encoded <= max_pixels


class Decoders:
    """Decodes images, from `start` to `stop`, which are called on the event loop."""

    def __init__(self, max_children: int, settings: Settings, metrics: Metrics) -> None:
        """Decode light images in up to *max_children* children."""
        self._max_children = max_children
        self._settings = settings
        self._metrics = metrics

        self.light = SharedChildren(metrics)
        self.large = SharedChildren(metrics, max(MAX_PIXELS, settings.max_pixels))

        # Bytes of memory of the children; None: what this process may use.
        self.budget: int | None = None

        # Clients with slow images, each until when. Their images take turns in half of the light
        # children: what is too slow for one has used much of its time.
        self._slow_until: OrderedDict[str, float] = OrderedDict()
        self._light_turns = asyncio.Semaphore()

        self._children: list[DecoderProcess] = []

    async def start(self) -> None:
        """Start the children; raises the errors of `DecoderProcess.start`."""
        # Divide the memory.
        self._loop = asyncio.get_running_loop()
        if self.budget is None:
            self.budget = decode_budget(self._settings, resident_bytes())
        plan = plan_children(self.budget, self._max_children, self._settings.max_pixels)

        # Clients with slow images share half of the light children.
        self._light_turns = asyncio.Semaphore(max(1, plan.light // 2))
        log.debug("decoder processes", extra=plan._asdict())
        self._metrics.decoders.set(plan.light)
        self._metrics.max_decode_bytes.set(plan.large_memory)

        self.light.busy.capacity = plan.light
        self.large.busy.capacity = plan.large

        # Start the children; they tell which restrictions the system allows.
        settings = self._settings
        large = ChildOptions(
            memory=plan.large_memory,
            niceness=NICENESS,
            is_light=False,
            max_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            sandbox=settings.sandbox,
        )
        light = large._replace(memory=LIGHT_MEMORY, niceness=0, is_light=True)
        restrictions: set[str] = set()  # usually the same of all children

        for options in [light] * plan.light + [large] * plan.large:
            children = self.light if options.is_light else self.large
            process = DecoderProcess(
                shared_template(),
                options,
                DECODE_SECONDS,
                on_idle=children.finish,
                on_end=lambda reason: self._metrics.decoder_ended.labels(reason).inc(),
            )

            self._children.append(process)
            restrictions.add(await process.start())
            children.give_work(process)

        for text in restrictions:
            if text.startswith("no sandbox"):
                log.warning("images are decoded without a sandbox: %s", text)

    async def stop(self) -> None:
        """End the children; requests that they run, and those that wait, are refused."""
        self.light.close()
        self.large.close()
        for process in self._children:
            process.close(results.DRAINING)

    async def decode(
        self,
        image: bytes,
        preprocess: Preprocess,
        deadline: float = math.inf,
        client: str | None = None,
        batch_seconds: float = 0.0,
    ) -> DecodedImage:
        """Decode *image* of *client*, a key or address that shares the children for large images.

        Raises `ImageError`, and `RejectedError` if its children end, if it is not decoded before
        *deadline* or would be with less than *batch_seconds* left for its batch, or if too many
        large images wait. Images without a client are those of the server itself, and never too
        many.
        """
        # Refuse by the first bytes what no decoder accepts.
        if not image:
            raise empty_error()
        detect_format(image)

        # Decode. The seconds that no child had the image count as time in the queue.
        shape = (preprocess.crop, preprocess.crop, 3)
        sizes = range(math.prod(shape), math.prod(shape) + 1)  # only one is valid
        started = time.monotonic()
        reply, seconds = await self._run_with_retries(
            image,
            preprocess,
            child.PIXELS,
            sizes,
            deadline,
            client,
            latest=deadline - batch_seconds,
        )
        waited = max(0.0, time.monotonic() - started - seconds)

        # Read the warnings, which are bits of the reply.
        warnings = tuple(
            name for index, name in enumerate(child.WARNINGS) if reply.bits & (1 << index)
        )

        stages = {"decode_queue": waited, "decode": seconds}
        return DecodedImage(reply.data.reshape(shape), warnings, stages)

    async def copy(self, image: bytes) -> tuple[bytes, str]:
        """Copy *image* without metadata, with the errors of `decode`; return the copy and its suffix."""
        reply, _ = await self._run_with_retries(
            image,
            preprocess=None,
            kind=child.COPY,
            sizes=range(MAX_COPY_BYTES + 1),
            deadline=math.inf,
            client=None,
            latest=math.inf,
        )
        return reply.data.tobytes(), ".png" if reply.bits else ".jpg"

    def wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait in another thread than that of the event loop for *work*, a call of `decode` or `copy`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _run_with_retries(
        self,
        image: bytes,
        preprocess: Preprocess | None,
        kind: int,
        sizes: range,
        deadline: float,
        client: str | None,
        latest: float,
    ) -> tuple[Reply, float]:
        """Run a request in a light child or, if *image* is too much for one, in one for large images.

        If a child of either kind ends without the fault of the image, the request runs once more,
        in a child for large images. Its reply is of use until *latest*. Returns the reply, and
        the seconds that children had the image. Raises as `decode` does.
        """
        # Estimate from the header what the image costs; without one that tells it, it counts as
        # one of the largest.
        cost = estimate_cost(image, preprocess)
        max_pixels = self._settings.max_pixels
        pixels = max_pixels if cost is None else min(cost.pixels, max_pixels)
        seconds = light_seconds(len(image), cost, max_pixels)  # 0 for a large image

        rules = b"" if preprocess is None else _write_rules(preprocess)
        work = known_seconds(len(image), cost, max_pixels)
        make_request = partial(Request, image, rules, kind, sizes, work=work, latest=latest)

        # Run a light image in a light child, unless it turns out to be too much for one.
        light_end: ChildEnded | None = None
        light_busy = 0.0
        if seconds > 0:
            request = make_request(self._loop.create_future(), pixels=pixels, seconds=seconds)
            outcome = await self._run_light(request, client, deadline)
            light_busy = request.busy_seconds()

            if isinstance(outcome, ChildEnded):
                light_end = outcome
            else:
                error = error_of(outcome)
                if error is None:
                    return outcome, light_busy
                if error.code != child.TOO_MUCH_MEMORY:  # which its child lacked
                    raise error

        # Otherwise, run it in a child for large images. If it took too long for a light one, it
        # counts as one of the largest.
        is_slow = light_end is not None and is_fault_of_image(light_end)
        if is_slow:
            pixels = max_pixels
        group = None if client is None else (client, is_slow)
        has_crashed = light_end is not None and not is_slow

        reply, large_busy = await self._run_large(
            partial(make_request, pixels=pixels),
            group,
            deadline,
            num_tries=1 if has_crashed else 2,
        )
        return reply, light_busy + large_busy

    async def _run_large(
        self,
        make_request: Callable[["asyncio.Future[Any]"], Request],
        group: Group,
        deadline: float,
        num_tries: int,
    ) -> tuple[Reply, float]:
        """Run a request of *group* in children for large images, until one does not crash.

        At most *num_tries* of them get it. Returns the reply, and the seconds that they had the
        image. Raises as `decode` does.
        """
        busy = 0.0
        reason = ""  # for which the last child has crashed

        for _ in range(num_tries):
            request = make_request(self._loop.create_future())
            outcome = await self._run(
                request, self.large, group, deadline, results.DECODERS_BUSY
            )
            busy += request.busy_seconds()

            if isinstance(outcome, Reply):
                return without_error(outcome), busy
            if is_fault_of_image(outcome):
                raise RejectedError(results.DAMAGED)
            reason = outcome.reason

        is_kill = reason in {signal.SIGKILL.name, pool.UNKNOWN}  # by the system or a user
        raise RejectedError(results.DECODER_KILLED if is_kill else results.DECODER_CRASHED)

    async def _run_light(
        self, request: Request, client: str | None, deadline: float
    ) -> Reply | ChildEnded:
        """Let a light child run *request* of *client*; one with slow images waits for its turn."""
        if client is None or self._slow_until.get(client, 0.0) < time.monotonic():
            reply = await self._run(
                request, self.light, group=None, deadline=deadline, late=results.DEADLINE
            )
        else:
            # What will be too slow needs room among the large ones, too.
            if not self.large.has_room(self._settings.max_pixels, (client, True)):
                raise RejectedError(results.DECODERS_BUSY)
            reply = await self._run_in_turn(request, deadline)

        if client is not None and isinstance(reply, ChildEnded) and is_fault_of_image(reply):
            self._note_slow(client)
        return reply

    def _note_slow(self, client: str) -> None:
        """Remember that an image of *client* was too slow; of too many, forget the one that was slow longest ago."""
        self._slow_until[client] = time.monotonic() + SLOW_SECONDS
        self._slow_until.move_to_end(client)
        if len(self._slow_until) > MAX_SLOW_CLIENTS:
            self._slow_until.popitem(last=False)

    async def _run_in_turn(self, request: Request, deadline: float) -> Reply | ChildEnded:
        """Let a light child run *request* when one of the turns of clients with slow images is free."""
        end = None if deadline == math.inf else deadline
        try:
            async with asyncio.timeout_at(end):
                await self._light_turns.acquire()
        except TimeoutError as error:
            raise RejectedError(results.DEADLINE) from error

        try:
            return await self._run(
                request, self.light, group=None, deadline=deadline, late=results.DEADLINE
            )
        finally:
            self._light_turns.release()

    async def _run(
        self,
        request: Request,
        children: SharedChildren,
        group: Group,
        deadline: float,
        late: HttpError,
    ) -> Reply | ChildEnded:
        """Let one of *children* run *request* of *group*; raises `RejectedError`, after *deadline* with *late*."""
        timer: asyncio.TimerHandle | None = None
        if deadline < math.inf:
            timer = self._loop.call_at(deadline, request.settle, late)

        children.put(request, group)
        try:
            outcome: Reply | ChildEnded | HttpError = await request.result
        finally:
            if timer is not None:
                timer.cancel()

        if isinstance(outcome, HttpError):
            raise RejectedError(outcome)
        return outcome


def is_fault_of_image(end: ChildEnded) -> bool:
    """Tell whether a child ended because of its image, not by the system or a user."""
    return end.reason in {pool.TIME, pool.WRONG_REPLY}


def error_of(reply: Reply) -> ImageError | None:
    """Return the error of the image that *reply* has; None for one with data."""
    if reply.kind < child.FIRST_ERROR:
        return None
    code, status = child.ERRORS[reply.kind - child.FIRST_ERROR]
    return ImageError(reply.data.tobytes().decode(errors="replace"), code=code, status=status)


def without_error(reply: Reply) -> Reply:
    """Return *reply*, or raise the error of the image that it has."""
    error = error_of(reply)
    if error is not None:
        raise error
    return reply


@functools.lru_cache(maxsize=64)
def _write_rules(preprocess: Preprocess) -> bytes:
    return preprocess.model_dump_json().encode()
