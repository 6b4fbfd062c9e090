"""Diagnose measurements: which stage is the bottleneck, what to change and the expected gain."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from sopdeploy.config import StrictModel
from sopdeploy.doctor.measure import LoadStep

Limit: TypeAlias = Literal["runtime", "decode", "queue", "client", "network", "load"]

BUSY = 0.85  # a stage with a higher utilization is saturated
MIN_UTILIZATION = 0.05  # lower bound of utilizations, which limits the estimated gain


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
        decoders_per_process = best.decoders // best.processes  # what the setting counts
        more = min(2.0, 1 / max(best.runtime_busy, MIN_UTILIZATION)) - 1
        return Advice(
            limit="decode",
            why=f"decoders are the bottleneck: all {best.decoders} are busy for {decoders} of the time, the "
            f"runtime for {runtime}",
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
