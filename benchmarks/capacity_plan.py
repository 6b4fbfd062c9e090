"""From a rate of images and a p99 to replicas, cores, bandwidth and what an autoscaler should be told."""

import math
from dataclasses import dataclass

from capacity_model import FULLEST, Forecast, System, forecast

HALVINGS = 12  # of the interval in which the highest rate lies: to 1 in 4,000 of capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked of the replicas: *p99_ms* also with one lost, and a share *headroom* left free."""

    p99_ms: float
    headroom: float
    kilobytes: float  # of an image on the wire, 1000 bytes each
    engine_cores: float = 0.0  # that the engine computes on: its threads where it is a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A plan for *rate* images per second: *now* with all replicas, *lost* with one of them gone."""

    rate: float
    replicas: int
    now: Forecast
    lost: Forecast
    cores: float  # of all replicas, to the tenth
    gbit_per_s: float  # that arrive, of all replicas

    @property
    def each(self) -> float:
        """Return the images per second of one replica."""
        return self.rate / self.replicas

    @property
    def held(self) -> float:
        """Return the images that a replica holds on average (Little): the metric `sopdeploy_queue_depth`."""
        return self.each * self.now.mean_ms / 1000


def provisioned(*, engine: tuple[float, float], largest: int, decode_ms: float, loop_ms: float) -> System:
    """Return a replica with as many decoders as the slower of its engine and its event loop can use."""
    fixed_ms, each_ms = engine
    bare = System(
        fixed_ms=fixed_ms, each_ms=each_ms, largest=largest, decode_ms=0.0, loop_ms=loop_ms, decoders=1
    )
    return System(
        fixed_ms=fixed_ms,
        each_ms=each_ms,
        largest=largest,
        decode_ms=decode_ms,
        loop_ms=loop_ms,
        decoders=max(1, math.ceil(bare.capacity * decode_ms / 1000)),
    )


def cores_each(system: System, wanted: Wanted) -> float:
    """Return the cores that one replica at its capacity keeps at work, to the next tenth."""
    at_work = system.capacity * (system.decode_ms + system.loop_ms) / 1000
    return math.ceil(10 * (wanted.engine_cores + at_work) - 1e-9) / 10


def highest_rate(system: System, p99_ms: float) -> float:
    """Return the images per second at which one replica just keeps *p99_ms*; `ValueError` where none does."""
    low, high = 0.0, FULLEST * system.capacity
    if forecast(system, high).p99_ms <= p99_ms:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if forecast(system, middle).p99_ms <= p99_ms else (low, middle)
    if low == 0.0:
        alone = system.loop_ms + system.decode_ms + system.batch_ms(1)
        raise ValueError(
            f"p99 of {p99_ms:g} ms: an image alone takes {alone:.1f} ms, and some meet a batch at work"
        )
    return low


def plan(system: System, wanted: Wanted, rates: list[float]) -> list[Row]:
    """Return a row for each of *rates*, with the fewest replicas that keep headroom, and p99 with one lost.

    Raises `ValueError` where no number of replicas keeps the p99.
    """
    most = highest_rate(system, wanted.p99_ms)
    return [row(system, wanted, rate, most) for rate in rates]


def row(system: System, wanted: Wanted, rate: float, most: float) -> Row:
    """Return the plan for *rate*, where one replica keeps the p99 up to *most* images per second."""
    kept_free = math.ceil(rate / (system.capacity * (1 - wanted.headroom)))
    replicas = max(kept_free, math.ceil(rate / most) + 1)
    return Row(
        rate=rate,
        replicas=replicas,
        now=forecast(system, rate / replicas),
        lost=forecast(system, rate / (replicas - 1)),
        cores=round(replicas * cores_each(system, wanted), 1),
        gbit_per_s=rate * wanted.kilobytes * 8 / 1e6,
    )
