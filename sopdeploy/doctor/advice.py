"""Diagnose measurements: which stage is the bottleneck, what to change and the expected gain."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sopdeploy.config import StrictModel
from sopdeploy.doctor.measure import LoadStep

Limit: TypeAlias = Literal["engine", "decode", "queue", "client", "network", "cores", "load"]

BUSY = 0.85  # a stage with a higher utilization is saturated
MIN_UTILIZATION = 0.05  # lower bound of utilizations, which limits the estimated gain
MAX_DECODER_FACTOR = 4
MIN_GAIN = 0.05  # smaller gains are within noise
EXPECTED = "expected: up to +{:.0%}"


class Advice(StrictModel):
    """The bottleneck (*limit*), the evidence (*why*), what to *change* and the expected *gain*."""

    limit: Limit
    why: str
    change: str
    gain: str


def judge(best: LoadStep, steps: Sequence[LoadStep], *, largest_batch: int, cores: int | None) -> Advice:
    """Derive the advice from *best*, the step with the highest rate.

    *steps* are all measurements, used to model batch time by batch size. *cores* is the number of cores of
    the server, if known.
    """
    stages_ms = sum(best.stage_ms.values()) - best.stage_ms["receive"]
    transfer_ms = best.elsewhere_ms + best.stage_ms["receive"]
    headroom = 1 / max(best.engine_busy, best.decoder_busy, MIN_UTILIZATION) - 1
    gain = f"{EXPECTED.format(max(0.0, headroom))}, until engine or decoders are the bottleneck"
    fullest = max(steps, key=lambda step: step.refused.get("queue_full", 0))
    idle = f"the engine was busy for only {best.engine_busy:.0%}"
    if best.engine_busy >= BUSY:
        return _engine(best, steps, largest_batch)
    if best.decoder_busy >= BUSY:
        return _decoders(best, cores)
    if fullest.refused.get("queue_full"):
        return Advice(
            limit="queue",
            why=f"the queue is the bottleneck: {fullest.refused_share:.0%} of the requests were rejected "
            f"while the engine was busy for only {fullest.engine_busy:.0%} of the time",
            change=f"--queue-size {max(64, 2 * fullest.concurrency)}",
            gain=gain,
        )
    if best.client_busy >= BUSY:
        return Advice(
            limit="client",
            why=f"this client is the bottleneck: its core is {min(1.0, best.client_busy):.0%} busy",
            change="run doctor on a faster machine, or on several at once",
            gain=f"{idle}: the server can handle more load",
        )
    if transfer_ms > stages_ms:
        return Advice(
            limit="network",
            why=f"the connection to the server is the bottleneck: a request spends {transfer_ms:.1f} ms "
            f"in HTTP and on the network, {stages_ms:.1f} ms in the server's stages",
            change="send smaller files, send several images per request, or use a nearer client",
            gain=gain,
        )
    if best.concurrency < max(step.concurrency for step in steps):
        return Advice(
            limit="cores",
            why=f"more than {best.concurrency} clients did not increase the rate, although {idle}, the "
            f"decoders for {best.decoder_busy:.0%}: too few cores",
            change="give the server more processor cores, or stop other processes on them",
            gain=gain,
        )
    return Advice(
        limit="load",
        why=f"no bottleneck with {best.concurrency} clients: the engine was busy for {best.engine_busy:.0%}, "
        f"the decoders for {best.decoder_busy:.0%}",
        change=f"--concurrency {2 * best.concurrency} increases the load",
        gain=gain,
    )


def _engine(best: LoadStep, steps: Sequence[LoadStep], largest_batch: int) -> Advice:
    """Advise larger batches if the batch times predict a gain, otherwise a faster engine."""
    why = f"the engine is the bottleneck: busy for {min(1.0, best.engine_busy):.0%} of the time"
    gain = gain_of_larger_batches(steps, largest_batch) if best.mean_batch >= 0.8 * largest_batch else 0.0
    if gain > MIN_GAIN:
        return Advice(
            limit="engine",
            why=f"{why}, with batches of {best.mean_batch:.1f} of {largest_batch}",
            change=f"--max-batch {2 * largest_batch}",
            gain=f"{EXPECTED.format(gain)}, from the measured batch times",
        )
    return Advice(
        limit="engine",
        why=why,
        change="a faster engine: a bundle of --precision fp16 or int8, more --threads, or a GPU",
        gain="the engine determines the rate; no other setting changes it",
    )


def gain_of_larger_batches(steps: Sequence[LoadStep], largest_batch: int) -> float:
    """Predict the gain of doubling the batch size from a linear fit t(n) = a + b n of the batch times."""
    points = [(step.mean_batch, step.infer_ms_per_batch) for step in steps if step.batches]
    (small, short), (large, long) = min(points), max(points)
    if large < 1.5 * small:
        return 0.0
    per_image = (long - short) / (large - small)
    fixed = max(0.0, long - per_image * large)
    now = fixed / largest_batch + per_image
    return now / max(1e-9, fixed / (2 * largest_batch) + per_image) - 1 if per_image > 0 else 1.0


def _decoders(best: LoadStep, cores: int | None) -> Advice:
    """Advise more decoders, as many as the engine can use and the cores allow."""
    factor = 1 / max(best.engine_busy, 1 / MAX_DECODER_FACTOR)
    now = best.decoders // best.processes  # the setting counts those of one process
    decoders = min(math.ceil(now * factor), cores // best.processes if cores else now * MAX_DECODER_FACTOR)
    change = f"--set decoders={decoders}, or send smaller images"
    gain = min(factor, decoders / now) - 1
    if decoders <= now:
        change = "send smaller images, or use more cores: there is already a decoder per core"
        gain = factor - 1
    return Advice(
        limit="decode",
        why=f"decoders are the bottleneck: all {best.decoders} are busy for "
        f"{min(1.0, best.decoder_busy):.0%} of the time, the engine for {best.engine_busy:.0%}",
        change=change,
        gain=f"{EXPECTED.format(max(0.0, gain))}, until the engine is the bottleneck",
    )
