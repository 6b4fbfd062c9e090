"""From the numbers to a word: which stage is the limit, what to change, and what that should bring."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sopdeploy.config import StrictModel
from sopdeploy.doctor.measure import Measured

Limit: TypeAlias = Literal["engine", "decode", "queue", "client", "network", "cores", "load"]

BUSY = 0.85  # a stage at work for this share of the time has no room left worth speaking of
FEW = 0.05
MOST_DECODERS_TIMES = 4
WORTH = 0.05  # a gain below this is noise


class Advice(StrictModel):
    """The stage that is the *limit*, *why* one can say so, what to *change*, and the *gain* to expect."""

    limit: Limit
    why: str
    change: str
    gain: str


def judge(best: Measured, steps: Sequence[Measured], *, largest_batch: int, cores: int | None) -> Advice:
    """Return the advice that the step *best* calls for.

    *steps* are all that were measured, for the time of a batch by its size; *cores* are those of the
    server's machine where they are known.
    """
    if best.engine_busy >= BUSY:
        return engine(best, steps, largest_batch)
    if best.decoder_busy >= BUSY:
        return decode(best, cores)
    full = max(steps, key=lambda step: step.refused.get("queue_full", 0))
    if full.refused.get("queue_full"):
        return queue(best, full)
    if best.client_busy >= BUSY:
        return client(best)
    inside = sum(best.stage_ms.values()) - best.stage_ms["receive"]
    if best.elsewhere_ms + best.stage_ms["receive"] > inside:
        return network(best, inside)
    return cores_shared(best) if best.concurrency < max(step.concurrency for step in steps) else load(best)


def engine(best: Measured, steps: Sequence[Measured], largest_batch: int) -> Advice:
    """The engine never rests: only larger batches or a faster engine help."""
    why = f"the engine is the limit: at work for {min(1.0, best.engine_busy):.0%} of the time"
    gain = larger_batches(steps, largest_batch) if best.mean_batch >= 0.8 * largest_batch else 0.0
    if gain > WORTH:
        return Advice(
            limit="engine",
            why=f"{why}, in batches of {best.mean_batch:.1f} of {largest_batch}",
            change=f"--max-batch {2 * largest_batch}",
            gain=f"{up_to(gain)}, by the time that its batches take here",
        )
    return Advice(
        limit="engine",
        why=why,
        change="a faster engine: a bundle of --precision fp16 or int8, more --threads, or a GPU",
        gain="the rate follows the engine's; no other setting changes it",
    )


def larger_batches(steps: Sequence[Measured], largest_batch: int) -> float:
    """Return the gain of batches twice as large, where t(n) = a + b n fits the batches that were seen."""
    seen = [(step.mean_batch, step.infer_ms_per_batch) for step in steps if step.batches]
    (few, short), (many, long) = min(seen), max(seen)
    if many < 1.5 * few:
        return 0.0
    each = (long - short) / (many - few)
    fixed = max(0.0, long - each * many)
    now = fixed / largest_batch + each
    return now / max(1e-9, fixed / (2 * largest_batch) + each) - 1 if each > 0 else 1.0


def decode(best: Measured, cores: int | None) -> Advice:
    """The decoders never rest while the engine does."""
    why = (
        f"decoders are the limit: all {best.decoders} at work for {min(1.0, best.decoder_busy):.0%} of the "
        f"time, the engine for {best.engine_busy:.0%}"
    )
    times = 1 / max(best.engine_busy, 1 / MOST_DECODERS_TIMES)
    wanted = min(math.ceil(best.decoders * times), cores or best.decoders * MOST_DECODERS_TIMES)
    if wanted <= best.decoders:
        return Advice(
            limit="decode",
            why=why,
            change="send smaller pictures, or move to more cores: there is a decoder for each core",
            gain=f"{up_to(times - 1)}, until the engine is the limit",
        )
    return Advice(
        limit="decode",
        why=why,
        change=f"--set decoders={wanted}, or send smaller pictures",
        gain=f"{up_to(min(times, wanted / best.decoders) - 1)}, until the engine is the limit",
    )


def queue(best: Measured, full: Measured) -> Advice:
    """Requests are refused in the step *full* although engine and decoders have time even in the best."""
    return Advice(
        limit="queue",
        why=f"the queue is the limit: {full.refused_share:.0%} of the requests were refused while the engine "
        f"was at work for only {full.engine_busy:.0%} of the time",
        change=f"--queue-size {max(64, 2 * full.concurrency)}",
        gain=f"{up_to(room(best))}, until engine or decoders are the limit",
    )


def client(best: Measured) -> Advice:
    """This program is too slow to load the server."""
    return Advice(
        limit="client",
        why=f"this client is the limit: its core is at work for {min(1.0, best.client_busy):.0%} of the time",
        change="run doctor on a faster machine, or on several at once",
        gain=f"the engine was at work for only {best.engine_busy:.0%}: the server can do more than was asked",
    )


def network(best: Measured, inside: float) -> Advice:
    """Most of a request's time passes outside of the server's stages."""
    outside = best.elsewhere_ms + best.stage_ms["receive"]
    return Advice(
        limit="network",
        why=f"the way to the server is the limit: {outside:.1f} ms of a request pass in HTTP and on the "
        f"network, {inside:.1f} ms in the server's stages",
        change="send smaller files, several images in one request, or ask from nearer",
        gain=f"{up_to(room(best))}, until engine or decoders are the limit",
    )


def cores_shared(best: Measured) -> Advice:
    """More requests gave no more answers though no stage is always at work: they wait for processor cores."""
    return Advice(
        limit="cores",
        why=f"more than {best.concurrency} requests at once gave no more answers, though the engine was at "
        f"work for only {best.engine_busy:.0%}, the decoders for {best.decoder_busy:.0%}: too few cores",
        change="give the server more processor cores, or fewer neighbours on them",
        gain=f"{up_to(room(best))}, until engine or decoders are the limit",
    )


def load(best: Measured) -> Advice:
    """Nothing is at its limit."""
    return Advice(
        limit="load",
        why=f"nothing is at its limit with {best.concurrency} requests at once: the engine was at work for "
        f"{best.engine_busy:.0%}, the decoders for {best.decoder_busy:.0%}",
        change=f"--concurrency {2 * best.concurrency} asks for more",
        gain=f"{up_to(room(best))}, until engine or decoders are the limit",
    )


def room(best: Measured) -> float:
    """Return the gain until the busier of engine and decoders never rests."""
    return 1 / max(best.engine_busy, best.decoder_busy, FEW) - 1


def up_to(gain: float) -> str:
    """Return *gain*, 0.41 say, in words."""
    return f"expected: up to +{max(0.0, gain):.0%}"
