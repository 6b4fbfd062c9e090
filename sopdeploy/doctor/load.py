"""Bounded load on a server that may be in use: a closed loop of clients, a few more at each step.

It can do no harm: a client sends its next request only when the one before is answered, a refusal is obeyed
for as long as the server says, and the first error that is none ends everything.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence

from sopdeploy.client import AsyncClient
from sopdeploy.doctor.measured import Measured, measure
from sopdeploy.doctor.scrape import Between, Scrape, read
from sopdeploy.errors import OverloadedError, ServiceError

REFUSAL_PAUSE_SECONDS = 1.0  # where the server names none
MOST_REFUSED = 0.5  # more clients would only be refused


class Load:
    """The clients of one examination; *bodies* are sent in turn."""

    def __init__(self, client: AsyncClient, bodies: Sequence[bytes], model: str | None) -> None:
        self.stopped: str | None = None  # the error that ended the load early
        self._client = client
        self._bodies = bodies
        self._model = model
        self._ended = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._latencies: list[float] = []
        self._refused: Counter[str] = Counter()

    async def run(self, ramp: Sequence[int], seconds: float) -> list[Measured]:
        """Return a measured step for each number of clients in *ramp*, all within about *seconds*."""
        steps: list[Measured] = []
        try:
            before = await self._scrape()
            for concurrency in ramp:
                self._grow(concurrency)
                step, before = await self._step(before, concurrency, seconds / len(ramp))
                steps.append(step)
                if self._ended.is_set() or step.refused_share > MOST_REFUSED:
                    break
        finally:
            self._ended.set()
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)
        return steps

    async def _step(self, before: Scrape, concurrency: int, seconds: float) -> tuple[Measured, Scrape]:
        self._latencies, self._refused = [], Counter()
        busy = time.thread_time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        after = await self._scrape()
        between = Between(before, after)
        share = (time.thread_time() - busy) / between.seconds
        step = measure(between, self._latencies, self._refused, concurrency=concurrency, client_busy=share)
        return step, after

    def _grow(self, concurrency: int) -> None:
        for number in range(len(self._workers), concurrency):
            self._workers.append(asyncio.create_task(self._work(number)))

    async def _work(self, number: int) -> None:
        while not self._ended.is_set():
            number += 1
            started = time.monotonic()
            try:
                await self._client.classify(self._bodies[number % len(self._bodies)], model=self._model)
            except OverloadedError as problem:
                self._refused[problem.code] += 1
                await asyncio.sleep(problem.retry_after or REFUSAL_PAUSE_SECONDS)
            except ServiceError as problem:
                self.stopped = self.stopped or str(problem)
                self._ended.set()
            else:
                self._latencies.append(time.monotonic() - started)

    async def _scrape(self) -> Scrape:
        return read(await self._client.metrics())


def ramp_to(concurrency: int) -> list[int]:
    """Return 1, 2, 4 and so on, up to *concurrency*."""
    powers = [2**n for n in range(concurrency.bit_length()) if 2**n < concurrency]
    return [*powers, concurrency]
