"""One step of the load: what the clients saw and what the server says it did meanwhile."""

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sopdeploy.client import AsyncClient
from sopdeploy.config import StrictModel
from sopdeploy.errors import OverloadedError, ServiceError


@dataclass(frozen=True, slots=True)
class Scrape:
    """What `/metrics` said at *moment* (`time.monotonic`)."""

    samples: tuple[Sample, ...]
    moment: float = field(default_factory=time.monotonic)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples `sopdeploy_`*name* that have *labels*; 0 where there is none."""
        wanted = labels.items()
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"sopdeploy_{name}" and wanted <= sample.labels.items()
        )

    @property
    def processes(self) -> int:
        """Return how many processes answer behind the port, each with an engine of its own."""
        return sum(sample.name == "sopdeploy_decoders" for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Between:
    """What happened from the scrape *before* to that *after*."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Return how long that was."""
        return self.after.moment - self.before.moment

    def grown(self, name: str, **labels: str) -> float:
        """Return by how much a counter grew; a server that began anew in between has none."""
        return max(0.0, self.after.total(name, **labels) - self.before.total(name, **labels))

    def mean(self, name: str, **labels: str) -> float:
        """Return the mean of what a histogram saw; 0 where it saw nothing."""
        count = self.grown(f"{name}_count", **labels)
        return self.grown(f"{name}_sum", **labels) / count if count else 0.0


def read(text: str) -> Scrape:
    """Return the scrape that *text* is; raises `ServiceError` where no sopdeploy server wrote it."""
    try:
        samples = tuple(
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("sopdeploy_")
        )
    except ValueError as problem:
        raise not_ours(str(problem)) from problem
    scrape = Scrape(samples)
    if not scrape.processes:
        raise not_ours("its numbers are not there")
    return scrape


def not_ours(reason: str) -> ServiceError:
    """Return the error of numbers that this version does not know."""
    return ServiceError(
        f"/metrics: not those of a sopdeploy server of this version ({reason})",
        code="foreign_answer",
        status=200,
    )


STAGES = ("receive", "decode", "queue", "infer")


class Measured(StrictModel):
    """So many clients at once for so many seconds.

    Rates are images per second, times milliseconds. `engine_busy`, `decoder_busy` and `client_busy` are
    shares of the step: of all engines (one for each process of the server), of all decoders, of the one core
    that this client can use.
    `stage_ms` is the mean of an image in each stage; `elsewhere_ms` what of a request no stage explains: the
    network, HTTP and the event loops on both sides.
    """

    concurrency: int
    seconds: float
    answered: int
    rate: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    refused: dict[str, int]
    engines: int
    engine_busy: float
    decoder_busy: float
    decoders: int
    client_busy: float
    batches: int
    mean_batch: float
    infer_ms_per_batch: float
    stage_ms: dict[str, float]
    elsewhere_ms: float

    @property
    def refused_share(self) -> float:
        """Return which share of the requests was refused."""
        refused = sum(self.refused.values())
        return refused / max(1, refused + self.answered)


def measure(
    between: Between,
    latencies: Sequence[float],
    refused: Mapping[str, int],
    *,
    concurrency: int,
    client_busy: float,
) -> Measured:
    """Return the step whose answers took *latencies* (seconds), *between* two scrapes."""
    engines = between.after.processes
    decoders = int(between.after.total("decoders"))
    stage_ms = {name: 1000 * between.mean("stage_duration_seconds", stage=name) for name in STAGES}
    mean_ms = 1000 * statistics.fmean(latencies) if latencies else 0.0
    return Measured(
        concurrency=concurrency,
        seconds=between.seconds,
        answered=len(latencies),
        rate=len(latencies) / between.seconds,
        p50_ms=1000 * percentile(latencies, 0.50),
        p95_ms=1000 * percentile(latencies, 0.95),
        p99_ms=1000 * percentile(latencies, 0.99),
        refused=dict(refused),
        engines=engines,
        engine_busy=between.grown("stage_duration_seconds_sum", stage="infer") / (between.seconds * engines),
        decoder_busy=between.grown("decode_seconds_total") / (between.seconds * max(1, decoders)),
        decoders=decoders,
        client_busy=client_busy,
        batches=int(between.grown("batch_size_count")),
        mean_batch=between.mean("batch_size"),
        infer_ms_per_batch=stage_ms["infer"],
        stage_ms=stage_ms,
        elsewhere_ms=max(0.0, mean_ms - sum(stage_ms.values())),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of *values* that *share* of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def bare_ratio(best: Measured, steps: Sequence[Measured]) -> float:
    """Return the rate of *best* over that of the engines alone, fed without a pause in their best batches.

    An engine alone is the fewest engine seconds per image of any of *steps*.
    """
    alone = [step.infer_ms_per_batch / step.mean_batch for step in steps if step.mean_batch]
    return best.rate * min(alone) / 1000 / best.engines if alone else 0.0


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
