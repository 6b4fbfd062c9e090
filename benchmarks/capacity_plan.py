"""Compute replicas, cores, bandwidth and autoscaler values from a rate of images and a p99."""

import math
from dataclasses import dataclass, replace

from capacity_model import MAX_LOAD, Forecast, System, forecast

BISECTIONS = 12  # find the highest rate to 1/4,000 of the capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Requirements: *p99_ms*, also with one replica lost, and the fraction *headroom* of unused capacity."""

    p99_ms: float
    headroom: float
    kilobytes: float  # size of an encoded image; 1 kilobyte is 1000 bytes
    engine_cores: float = 0.0  # threads of a CPU runtime; 0 for a GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A plan for *rate* images per second: *now* with all replicas, *lost* with one of them lost."""

    rate: float
    replicas: int
    now: Forecast
    lost: Forecast
    cores: float  # of all replicas; those of each are rounded up to a tenth
    gbit_per_s: float  # received by all replicas

    @property
    def each(self) -> float:
        """Images per second of one replica."""
        return self.rate / self.replicas

    @property
    def held(self) -> float:
        """Mean number of images in a replica (Little's law): the metric `sopdeploy_queue_depth`."""
        return self.each * self.now.mean_ms / 1000


def provisioned(system: System) -> System:
    """Give each front end of *system* enough decoders for the slower of runtime and interpreter lock."""
    rate = replace(system, decode_ms=0.0).capacity / system.front_ends
    return replace(system, decoders=max(1, math.ceil(rate * system.decode_ms / 1000)))


def cores_each(system: System, wanted: Wanted) -> float:
    """Compute the busy cores of one replica at its capacity, rounded up to a tenth."""
    at_work = system.capacity * system.cpu_ms / 1000
    return math.ceil(10 * (wanted.engine_cores + at_work) - 1e-9) / 10


def highest_rate(system: System, p99_ms: float) -> float:
    """Compute the highest rate at which a replica meets *p99_ms*; raises `ValueError` if there is none."""
    low, high = 0.0, MAX_LOAD * system.capacity
    if forecast(system, high).p99_ms <= p99_ms:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if forecast(system, middle).p99_ms <= p99_ms else (low, middle)
    if low == 0.0:
        alone = system.cpu_ms + system.batch_ms(1)
        raise ValueError(
            f"p99 of {p99_ms:g} ms is impossible: an image takes {alone:.1f} ms without waiting, "
            "and some images wait for a running batch; allow a larger p99"
        )
    return low


def plan(system: System, wanted: Wanted, rates: list[float]) -> list[Row]:
    """Compute a plan for each of *rates*: the fewest replicas for the headroom and for the p99 with one lost.

    Raises `ValueError` if no number of replicas meets the p99.
    """
    most = highest_rate(system, wanted.p99_ms)
    return [row(system, wanted, rate, most) for rate in rates]


def row(system: System, wanted: Wanted, rate: float, most: float) -> Row:
    """Compute the plan for *rate*, given that one replica meets the p99 up to *most* images per second."""
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
