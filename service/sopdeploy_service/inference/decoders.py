"""Decode images in child processes: children for light images, and others for large ones.

A thread per child sends it an image and waits. Light children are small and have normal priority; an image
that is too large or takes too long for them is tried again by a child for large images, which has more memory
and low priority. So light images pass large ones, and the memory of all children is limited.

A child can also end without any fault of its image, as when the system runs out of memory. An image whose
child ends by another cause than its own limits is therefore decoded once more, by a child for large images.

Clients share the children for large images. Each has two groups of images there: slow ones, which are small
but took too long for a light child, and large ones. The groups take turns, and if too many images wait, the
group with most of them loses its last one.
"""

import asyncio
import logging
import math
import os
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding.child import PIXEL_BYTES, ChildOptions, LargerImageError
from sopdeploy_service.decoding.pool import (
    TIME,
    DecoderEndedError,
    DecoderProcess,
    is_stopped,
    shared_template,
)
from sopdeploy_service.images.decode import Decoded
from sopdeploy_service.inference.results import (
    DAMAGED,
    DEADLINE,
    DECODER_CRASHED,
    DECODER_KILLED,
    DECODERS_BUSY,
    RejectedError,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.device_memory import memory_limit, resident_bytes
from sopdeploy_service.settings import LARGE_BODY_SHARE, Settings

_MIB = 1 << 20
LIGHT_MEMORY, LIGHT_PIXELS, LIGHT_BODY = 80 * _MIB, 3_000_000, 2_000_000
LIGHT_SECONDS = 0.06  # of CPU time; a JPEG of 3 megapixels takes 0.03
OWN_MEMORY = 8 * _MIB  # of an idle child, beside the pages that it shares with its template
LARGE_MEMORY = 384 * _MIB  # for each child for large images, if there are several
NICENESS = 10  # of children for large images
USED_SHARE = 3 / 4  # of the memory; the rest is for batches, JSON, and pages that the allocator keeps
UPLOAD_SHARE = 1 / 8  # of the memory, at most, for request bodies
MAX_WAITING_LARGE = 8  # large images; for one more, one of the largest group gets 503
WATCH_SECONDS = 1.0  # between two looks at the processes; one that is stopped at both is ended

log = logging.getLogger("sopdeploy.service")

_Result = TypeVar("_Result")
Job: TypeAlias = Callable[[DecoderProcess], None]  # is called on the thread of a child
Refuse: TypeAlias = Callable[[], None]


class Plan(NamedTuple):
    """Number of children for light and for large images, and bytes of memory of one for large images."""

    light: int
    large: int
    large_memory: int


def upload_budget(settings: Settings, processes: int = 1) -> int:
    """Return how many bytes of request bodies one of *processes* may hold."""
    least = math.ceil(settings.max_body_bytes / LARGE_BODY_SHARE)  # admits one body of the largest size
    return min(settings.max_upload_bytes, max(least, int(memory_limit() * UPLOAD_SHARE / processes)))


def decode_budget(settings: Settings, at_rest: int, processes: int = 1) -> int:
    """Return the bytes for the children of one of *processes*; all processes occupy *at_rest* bytes."""
    uploads = upload_budget(settings, processes) * processes
    return (int(memory_limit() * USED_SHARE) - at_rest - uploads) // processes


def plan_children(budget: int, decoders: int, max_pixels: int) -> Plan:
    """Divide *budget* bytes among up to *decoders* children for light images and at least one for large ones.

    Each light child gets `LIGHT_MEMORY`; the others share the rest, up to the need of *max_pixels*.
    Of 1000 MiB, 4 light ones get 80 MiB each and one for large images gets 640, each beside 8 MiB of its own.
    """
    light_bytes = LIGHT_MEMORY + OWN_MEMORY  # of one child
    light = max(1, min(decoders, budget // light_bytes - 1))  # - 1: for a child for large images
    rest = budget - light * light_bytes
    large = max(1, min(decoders, rest // (LARGE_MEMORY + OWN_MEMORY)))
    largest_need = max_pixels * PIXEL_BYTES  # of any image
    # At least `LIGHT_MEMORY`: even if *max_pixels* is small, the file of an image can be large.
    large_memory = max(LIGHT_MEMORY, min(rest // large - OWN_MEMORY, largest_need))
    usual_need = min(LARGE_MEMORY // 2, largest_need)  # of 10 megapixels, such as a photo of a phone
    if light < decoders or large_memory < usual_need:
        log.warning(
            "the memory suffices for %d of %d decoders, and for large images that need %d MB",
            light, decoders, large_memory // 10**6,
        )  # fmt: skip
    return Plan(light, large, large_memory)


class SharedQueue:
    """Jobs in the order of arrival within each group; the groups take turns. Thread-safe.

    A group is a client, and whether its images are slow ones; that of the server's own jobs is None.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, bool] | None, deque[tuple[Job | None, Refuse]]] = OrderedDict()
        self._changed = threading.Condition()

    def put(
        self, job: Job | None, group: tuple[str, bool] | None = None, refuse: Refuse = lambda: None
    ) -> None:
        """Add *job* to *group*; if `MAX_WAITING_LARGE` wait, refuse it or the last one of a larger group.

        *refuse* is called if *job* will not run. The server's own jobs are never refused.
        """
        with self._changed:
            if group is not None and sum(map(len, self._groups.values())) >= MAX_WAITING_LARGE:
                sizes = {one: len(jobs) for one, jobs in self._groups.items() if one is not None}
                largest = max(sizes, key=lambda one: sizes[one], default=group)
                if sizes.get(largest, 0) <= sizes.get(group, 0) + 1:
                    refuse()
                    return
                _, refuse_last = self._groups[largest].pop()
                refuse_last()
            self._groups.setdefault(group, deque()).append((job, refuse))
            self._changed.notify()

    def get(self) -> Job | None:
        """Wait for a job; return the first one of the group whose turn it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._groups)
            group, waiting = self._groups.popitem(last=False)
            job, _ = waiting.popleft()
            if waiting:
                self._groups[group] = waiting  # after all others
            return job


class Decoders:
    """Decodes images, from `start` to `stop`."""

    def __init__(self, max_children: int, settings: Settings, metrics: Metrics) -> None:
        """Decode light images in up to *max_children* children."""
        self._max_children, self._settings, self._metrics = max_children, settings, metrics
        self.light: SimpleQueue[Job | None] = SimpleQueue()
        self.large = SharedQueue()
        self.budget: int | None = None  # bytes of memory of the children; None: what this process may use
        self._plan = Plan(light=0, large=0, large_memory=0)  # no children before `start`
        self.are_stopped = False  # whether a child or the template is stopped, as by SIGSTOP
        self._ending = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start children and threads, for calls on *loop*; raises the errors of `DecoderProcess`."""
        self._loop = loop
        if self.budget is None:
            self.budget = decode_budget(self._settings, resident_bytes())
        self._plan = plan = plan_children(self.budget, self._max_children, self._settings.max_pixels)
        log.debug("decoder processes", extra=plan._asdict())
        self._metrics.decoders.set(plan.light)
        self._metrics.max_decode_bytes.set(plan.large_memory)
        queues = [self.light] * plan.light + [self.large] * plan.large
        children = [self._start_child(is_light=jobs is self.light) for jobs in queues]
        if children[0].restrictions.startswith("no sandbox"):
            log.warning("images are decoded without a sandbox: %s", children[0].restrictions)
        for jobs, child in zip(queues, children, strict=True):
            # daemons: a child that hangs cannot block an exit
            threading.Thread(target=_run_jobs, args=(jobs, child), name="decoder", daemon=True).start()
        threading.Thread(target=self._watch, args=(children,), name="decoder_watch", daemon=True).start()

    def stop(self) -> None:
        """End the threads and their children."""
        self._ending.set()
        for jobs in [self.light] * self._plan.light + [self.large] * self._plan.large:
            jobs.put(None)

    async def decode(
        self, image: bytes, preprocess: Preprocess, deadline: float = math.inf, client: str | None = None
    ) -> Decoded:
        """Decode *image* of *client*, a key or address that shares the children for large images.

        Raises `ImageError`, and `RejectedError` if its children end, if none is free before *deadline*, or if
        too many large images wait; those without a client, of the server itself, are never refused.
        """
        return await self._attempt(image, lambda child: child.decode(image, preprocess), deadline, client)

    async def copy(self, image: bytes) -> tuple[bytes, str]:
        """Copy *image* without metadata, with the errors of `decode`; return the copy and its suffix."""
        return await self._attempt(image, lambda child: child.copy(image), math.inf, None)

    def wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait in another thread than that of the event loop for *work*, a call of `decode` or `copy`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _attempt(
        self, image: bytes, request: Callable[[DecoderProcess], _Result], deadline: float, client: str | None
    ) -> _Result:
        """Run *request* in a light child; for a large body, or if that fails, in one for large images.

        The child for large images gets it once more if it ends without the fault of the image.
        """
        is_light, is_slow = len(image) <= LIGHT_BODY, False
        num_ends = 0  # of children, without a fault of the image
        while True:
            seconds = None if deadline == math.inf else deadline - time.monotonic()
            group = None if client is None else (client, is_slow)
            try:
                async with asyncio.timeout(seconds):
                    return await asyncio.wrap_future(self._submit(request, group, is_light=is_light))
            except TimeoutError as error:
                raise RejectedError(DEADLINE if is_light else DECODERS_BUSY) from error
            except LargerImageError:  # raised by light children only
                pass
            except DecoderEndedError as error:
                num_ends += not error.is_limit
                if not is_light and (error.is_limit or num_ends > 1):
                    refusal = DECODER_KILLED if error.is_kill else DECODER_CRASHED
                    raise RejectedError(DAMAGED if error.is_limit else refusal) from error
                is_slow = is_light and error.is_limit
            is_light = False

    def _submit(
        self,
        request: Callable[[DecoderProcess], _Result],
        group: tuple[str, bool] | None,
        *,
        is_light: bool,
    ) -> "Future[_Result]":
        """Queue *request*; its future is no variable of `_attempt`, which its error would keep alive."""
        result: Future[_Result] = Future()
        job = partial(self._run, request, result)
        if is_light:
            self.light.put(job)
        else:
            self.large.put(job, group, partial(_refuse, result))
        return result

    def _run(
        self, request: Callable[[DecoderProcess], _Result], result: "Future[_Result]", child: DecoderProcess
    ) -> None:
        """Let *child* run *request* unless nobody waits for *result* any more."""
        if not result.set_running_or_notify_cancel():
            return
        started = time.monotonic()
        try:
            result.set_result(request(child))
        except Exception as error:  # who waits for the result gets it
            result.set_exception(error)
        finally:
            self._metrics.decode_seconds.inc(time.monotonic() - started)
            del (
                result
            )  # an error has this frame in its traceback, and would keep itself and its request alive

    def _watch(self, children: Sequence[DecoderProcess]) -> None:
        """End processes that are stopped; their images are decoded again, and others are started."""
        template = shared_template()
        suspects: set[int] = set()  # stopped at the last look
        while not self._ending.wait(WATCH_SECONDS):
            processes = {
                process for process in (template.process, *(one.process for one in children)) if process
            }
            stopped = {process for process in processes if is_stopped(process)}
            self.are_stopped = bool(stopped)
            for process in stopped & suspects:
                log.warning("the decoder process %d is stopped; it is ended", process)
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)  # not by the template, which may be the one
            suspects = stopped

    def _note_end(self, reason: str) -> None:
        """Count a child that has ended for *reason*; log one that did not end at its time limit."""
        self._metrics.decoder_ended.labels(reason).inc()
        if reason != TIME:
            log.warning("a decoder process has ended (%s) and is replaced", reason)

    def _start_child(self, *, is_light: bool) -> DecoderProcess:
        """Start a child with the limits of the light ones or of those for large images."""
        settings = self._settings
        options = ChildOptions(
            memory=LIGHT_MEMORY if is_light else self._plan.large_memory,
            niceness=0 if is_light else NICENESS,
            is_light=is_light,
            cpu_seconds=LIGHT_SECONDS if is_light else 0.0,  # 0: no limit
            max_bytes=settings.max_body_bytes,
            max_pixels=min(LIGHT_PIXELS, settings.max_pixels) if is_light else settings.max_pixels,
            formats=settings.formats,
            sandbox=settings.sandbox,
        )
        return DecoderProcess(shared_template(), options, settings.decode_seconds, self._note_end)


def _refuse(result: "Future[Any]") -> None:
    """End a request that does not run, unless nobody waits for *result* any more."""
    if result.set_running_or_notify_cancel():
        result.set_exception(RejectedError(DECODERS_BUSY))


def _run_jobs(jobs: "SimpleQueue[Job | None] | SharedQueue", child: DecoderProcess) -> None:
    """Run *jobs* with *child* until None is queued, then end the child."""
    while (job := jobs.get()) is not None:
        job(child)
        del job  # an idle thread must not keep an image or a model alive
    child.close()
