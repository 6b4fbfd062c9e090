"""Find the bottleneck of a running server from outside: bounded load, metrics, advice.

The load has an increasing number of clients. The measurement of each step combines client latencies with the
difference between two scrapes of `/metrics`.
"""

import asyncio
import contextlib
import io
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sopdeploy.client import AsyncClient, ModelInfo
from sopdeploy.client.requests import encode_image
from sopdeploy.config import StrictModel
from sopdeploy.data.folders import is_image, walk
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError
from sopdeploy.images.limits import SUFFIXES

_STAGES = ("receive", "decode", "queue", "infer")
REJECTION_DELAY = 1.0  # seconds, if the server names none
MAX_REJECTED = 0.5  # with more rejections, additional clients would only be rejected
BUSY = 0.85  # a stage with a higher utilization is saturated
MIN_UTILIZATION = 0.05  # lower bound of utilizations, which limits the estimated gain
MAX_FILES = 32
GENERATED_IMAGES = 4
IMAGE_SIZE = (640, 480)
REQUEST_TIMEOUT = 30.0  # seconds


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
    were busy. `num_decoders` is the sum over all processes. `stage_ms` is the mean time of an image per
    stage. `elsewhere_ms` is the rest of a request: network, HTTP and event loops. `refused` counts rejections
    by error code.
    """

    concurrency: int
    seconds: float
    answered: int
    rate: float
    p50_ms: float
    p99_ms: float
    refused: dict[str, int]
    num_runtimes: int
    num_processes: int
    runtime_busy: float
    decoder_busy: float
    num_decoders: int
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
        num_runtimes=runtimes,
        num_processes=len(after.processes),
        runtime_busy=infer_seconds / (seconds * runtimes),
        decoder_busy=increase("decode_seconds_total") / (seconds * max(1, decoders)),
        num_decoders=decoders,
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


Limit: TypeAlias = Literal["runtime", "decode", "queue", "client", "network", "load"]


class Advice(StrictModel):
    """The bottleneck (*limit*), the evidence (*why*), what to *change* and the expected *gain*."""

    limit: Limit
    why: str
    change: str
    gain: str


def judge(best: LoadStep, steps: Sequence[LoadStep]) -> Advice:
    """Derive the advice from *best*, the step with the highest rate of all *steps*."""
    server_ms = sum(best.stage_ms.values()) - best.stage_ms["receive"]
    transfer_ms = best.elsewhere_ms + best.stage_ms["receive"]
    headroom = 1 / max(best.runtime_busy, best.decoder_busy, MIN_UTILIZATION) - 1
    gain = f"expected: up to +{headroom:.0%}, until runtime or decoders are the bottleneck"
    most_rejected = max(steps, key=lambda step: step.refused.get("queue_full", 0))
    runtime, decoders = f"{min(1.0, best.runtime_busy):.0%}", f"{min(1.0, best.decoder_busy):.0%}"
    if best.runtime_busy >= BUSY:
        return Advice(
            limit="runtime",
            why=f"the runtime is the bottleneck: busy for {runtime} of the time, with batches of "
            f"{best.mean_batch:.1f}",
            change="a larger --max-batch, a bundle of --precision fp16 or int8, more --threads, or a GPU",
            gain="the runtime determines the rate; no other setting changes it",
        )
    if best.decoder_busy >= BUSY:
        decoders_per_process = best.num_decoders // best.num_processes  # what the setting counts
        more = min(2.0, 1 / max(best.runtime_busy, MIN_UTILIZATION)) - 1
        return Advice(
            limit="decode",
            why=f"decoders are the bottleneck: all {best.num_decoders} are busy for {decoders} of the time, "
            f"the runtime for {runtime}",
            change=f"--setting decoders={2 * decoders_per_process} on a machine with as many cores, or send "
            "smaller images",
            gain=f"expected: up to +{more:.0%}",
        )
    if most_rejected.refused.get("queue_full"):
        return Advice(
            limit="queue",
            why=f"the queue is the bottleneck: {most_rejected.refused_share:.0%} of the requests were "
            f"rejected while the runtime was busy for only {most_rejected.runtime_busy:.0%} of the time",
            change=f"--queue-size {max(64, 2 * most_rejected.concurrency)}",
            gain=gain,
        )
    if best.client_busy >= BUSY:
        return Advice(
            limit="client",
            why=f"this client is the bottleneck: its core is {min(1.0, best.client_busy):.0%} busy",
            change="run doctor on a faster machine, or on several at once",
            gain=f"the runtime was busy for only {runtime}: the server can handle more load",
        )
    if transfer_ms > server_ms:
        return Advice(
            limit="network",
            why=f"the connection to the server is the bottleneck: a request spends {transfer_ms:.1f} ms "
            f"in HTTP and on the network, {server_ms:.1f} ms in the server's stages",
            change="send smaller files, send several images per request, or use a nearer client",
            gain=gain,
        )
    return Advice(
        limit="load",
        why=f"no bottleneck with {best.concurrency} clients: the runtime was busy for {runtime}, the "
        f"decoders for {decoders}",
        change=f"more load (--concurrency {2 * best.concurrency}); if the rate does not grow with it, more "
        "processor cores",
        gain=gain,
    )


class Diagnosis(StrictModel):
    """Measurements per number of clients, the *best* of them and the *advice*.

    `stopped` is the error that ended the load early, if any.
    """

    url: str
    model: str
    device: str
    steps: tuple[LoadStep, ...]
    best: LoadStep
    advice: Advice
    notes: tuple[str, ...]
    stopped: str | None


def examine(
    url: str,
    *,
    images: Path | None = None,
    seconds: float = 20.0,
    concurrency: int = 32,
    model: str | None = None,
    api_key: str | None = None,
) -> Diagnosis:
    """Load the server at *url* for about *seconds* with up to *concurrency* clients and diagnose it.

    Raises `ServiceError` if the server is unreachable, rejects an image or completes no request under load,
    `DataError` if the folder *images* has no image, and `ConfigError` if *model* is required or unknown.
    """
    bodies = load_images(images)

    async def run() -> Diagnosis:
        async with AsyncClient(
            url, api_key=api_key, retries=0, timeout=REQUEST_TIMEOUT, max_connections=concurrency + 1
        ) as client:
            info = await client.info()
            chosen = _choose_model(info.models, model)
            for body in bodies:  # reports a bad image before the load, and warms up the runtime
                await client.classify(body, model=chosen.name)
            load = ServerLoad(client, bodies, chosen.name)
            steps = await load.run(concurrency, seconds)
        completed = [step for step in steps if step.answered]
        if not completed:
            reason = load.stopped or "every request was rejected"
            message = f"{url}: no request was completed under load ({reason})"
            raise ServiceError(message, code="nothing_answered", status=0)
        best = max(completed, key=lambda step: step.rate)
        return Diagnosis(
            url=url,
            model=chosen.name,
            device=f"{chosen.runtime} on {chosen.device}",
            steps=tuple(steps),
            best=best,
            advice=judge(best, completed),
            notes=tuple(_notes(url, len(info.models))),
            stopped=load.stopped,
        )

    return asyncio.run(run())


def load_images(folder: Path | None) -> list[bytes]:
    """Read up to 32 image files below *folder*, or generate JPEGs; raise `DataError` for an empty folder."""
    if folder is not None:
        paths = [path for path in walk(folder) if is_image(path.name)]
        if not paths:
            raise DataError(f"{folder}: contains no image ({', '.join(SUFFIXES)}); choose another folder")
        return [encode_image(path) for path in paths[:MAX_FILES]]
    images = []
    width, height = IMAGE_SIZE
    for seed in range(GENERATED_IMAGES):  # with detail like a photograph, so that file sizes are realistic
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC))
        grain = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
        file = io.BytesIO()
        pixels = (smooth.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=88)
        images.append(file.getvalue())
    return images


def _choose_model(models: tuple[ModelInfo, ...], name: str | None) -> ModelInfo:
    chosen = [model for model in models if name in {None, model.name}]
    if len(chosen) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise ConfigError(f"choose one of the server's models ({names})", setting="model", value=name)
    return chosen[0]


def _notes(url: str, models: int) -> list[str]:
    """List conditions that distort the measurements."""
    notes = []
    if urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}:
        notes.append("client and server share this machine and slow each other down; use another machine")
    if models > 1:
        notes.append("the server has several models; stage times include all of them")
    return notes
