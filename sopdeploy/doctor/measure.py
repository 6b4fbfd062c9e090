"""Load a server with an increasing number of clients and measure each step.

A measurement combines client latencies with the difference between two scrapes of `/metrics`.
"""

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sopdeploy.client import AsyncClient
from sopdeploy.config import StrictModel
from sopdeploy.errors import OverloadedError, ServiceError

_STAGES = ("receive", "decode", "queue", "infer")
REJECTION_DELAY = 1.0  # seconds, if the server names none
MAX_REJECTED = 0.5  # with more rejections, additional clients would only be rejected


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of `/metrics` at *moment* (`time.monotonic`), and the labels of the server processes."""

    samples: tuple[Sample, ...]
    processes: tuple[str, ...]
    moment: float = field(default_factory=time.monotonic)

    def total(self, name: str, **labels: str) -> float:
        """Sum the samples of `sopdeploy_<name>` that have all *labels*; 0 if there is none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"sopdeploy_{name}" and labels.items() <= sample.labels.items()
        )


def parse_metrics(text: str) -> Scrape:
    """Parse the text of `/metrics`; raise `ServiceError` if it is not from a sopdeploy server."""
    reason = "its metrics are missing"
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        samples, reason = [], str(error)
    own = tuple(sample for sample in samples if sample.name.startswith("sopdeploy_"))
    processes = tuple(
        sample.labels.get("process", "") for sample in own if sample.name == "sopdeploy_decoders"
    )
    if not processes:
        raise ServiceError(
            f"/metrics: not from a sopdeploy server of this version ({reason}); check the URL",
            code="foreign_answer",
            status=200,
        )
    return Scrape(own, processes)


class LoadStep(StrictModel):
    """Measurement of one step with a constant number of clients.

    Rates are images per second, times milliseconds. `runtime_busy`, `decoder_busy` and `client_busy` are the
    fractions of time for which the runtimes (one per device), the decoders and the one core of this client
    were busy. `decoders` is the sum over all `processes`. `stage_ms` is the mean time of an image per stage.
    `elsewhere_ms` is the rest of a request: network, HTTP and event loops. `refused` counts rejections by
    error code.
    """

    concurrency: int
    seconds: float
    answered: int
    rate: float
    p50_ms: float
    p99_ms: float
    refused: dict[str, int]
    runtimes: int
    processes: int
    runtime_busy: float
    decoder_busy: float
    decoders: int
    client_busy: float
    mean_batch: float
    stage_ms: dict[str, float]
    elsewhere_ms: float

    @property
    def refused_share(self) -> float:
        """Fraction of requests that the server rejected."""
        refused = sum(self.refused.values())
        return refused / max(1, refused + self.answered)


def measure_server(
    before: Scrape,
    after: Scrape,
    latencies: Sequence[float],
    refused: Mapping[str, int],
    *,
    concurrency: int,
    client_seconds: float,
) -> LoadStep:
    """Combine client *latencies* (seconds) and rejections by code with the difference of two scrapes.

    *client_seconds* is the processor time of this client.
    """

    def increase(name: str, **labels: str) -> float:
        return max(0.0, after.total(name, **labels) - before.total(name, **labels))  # 0 after a restart

    def mean(name: str, **labels: str) -> float:
        count = increase(f"{name}_count", **labels)
        return increase(f"{name}_sum", **labels) / count if count else 0.0

    seconds, decoders = after.moment - before.moment, int(after.total("decoders"))
    # Each process has a runtime of its own, but front ends (DEVICE:NUMBER) share the one of their device.
    runtimes = len({process.partition(":")[0] for process in after.processes})
    stage_ms = {name: 1000 * mean("stage_duration_seconds", stage=name) for name in _STAGES}
    mean_ms = 1000 * statistics.fmean(latencies) if latencies else 0.0
    quantiles = np.quantile(latencies or [0.0], (0.50, 0.99), method="inverted_cdf")
    p50_ms, p99_ms = (1000 * quantiles).tolist()
    infer_seconds = increase("stage_duration_seconds_sum", stage="infer")
    return LoadStep(
        concurrency=concurrency,
        seconds=seconds,
        answered=len(latencies),
        rate=len(latencies) / seconds,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        refused=dict(refused),
        runtimes=runtimes,
        processes=len(after.processes),
        runtime_busy=infer_seconds / (seconds * runtimes),
        decoder_busy=increase("decode_seconds_total") / (seconds * max(1, decoders)),
        decoders=decoders,
        client_busy=client_seconds / seconds,
        mean_batch=mean("batch_size"),
        stage_ms=stage_ms,
        elsewhere_ms=max(0.0, mean_ms - sum(stage_ms.values())),
    )


@dataclass(slots=True)
class ServerLoad:
    """Concurrent clients that send `bodies` in turn and stop at the first error.

    `stopped` is that error. `latencies` (seconds) and `refused` (by error code) belong to the current step.
    """

    client: AsyncClient
    bodies: Sequence[bytes]
    model: str
    stopped: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    latencies: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    async def run(self, concurrency: int, seconds: float) -> list[LoadStep]:
        """Measure 1, 2, 4, ... up to *concurrency* clients within about *seconds* in total."""
        powers = [2**n for n in range(concurrency.bit_length()) if 2**n < concurrency]
        ramp = [*powers, concurrency]
        steps: list[LoadStep] = []
        workers: list[asyncio.Task[None]] = []
        try:
            before = parse_metrics(await self.client.metrics())
            for clients in ramp:
                workers += [
                    asyncio.create_task(self._work(number)) for number in range(len(workers), clients)
                ]
                self.latencies, self.refused = [], Counter()
                started_cpu = time.thread_time()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), seconds / len(ramp))
                after = parse_metrics(await self.client.metrics())
                step = measure_server(
                    before,
                    after,
                    self.latencies,
                    self.refused,
                    concurrency=clients,
                    client_seconds=time.thread_time() - started_cpu,
                )
                steps.append(step)
                if self.ended.is_set() or step.refused_share > MAX_REJECTED:
                    break
                before = after
        finally:
            self.ended.set()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return steps

    async def _work(self, number: int) -> None:
        while not self.ended.is_set():
            number += 1
            started = time.monotonic()
            try:
                await self.client.classify(self.bodies[number % len(self.bodies)], model=self.model)
            except OverloadedError as error:
                self.refused[error.code] += 1
                await asyncio.sleep(error.retry_after or REJECTION_DELAY)
            except ServiceError as error:
                self.stopped = self.stopped or str(error)
                self.ended.set()
            else:
                self.latencies.append(time.monotonic() - started)
