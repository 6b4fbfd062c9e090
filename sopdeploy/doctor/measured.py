"""One step of the load: what the clients saw and what the server says it did meanwhile."""

import statistics
from collections.abc import Mapping, Sequence

from sopdeploy.doctor.scrape import Between
from sopdeploy.frozen import Frozen

STAGES = ("receive", "decode", "queue", "infer")


class Measured(Frozen):
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
