"""How long an image takes in a replica that gets so many a second: queueing arithmetic, nothing measured.

A replica is one process with one engine. An image passes its event loop (M/D/1), its decoders (M/D/c) and
its batcher. The batcher is work-conserving: a free engine takes what waits, at most the largest batch, and a
batch of n takes `fixed + each * n`. With Poisson arrivals the images that wait when a batch ends are a Markov
chain, because all that follows depends on their number alone; batch sizes and times in the batcher follow
from it without an approximation but the grid of time. The stages are taken as independent, with Poisson
arrivals each.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRID = 128  # steps of time in the largest batch
BEYOND = 300  # images waiting beyond a batch that are told apart; at 0.98 of capacity hardly ever more
NEGLIGIBLE = 1e-12
FULLEST = 0.98  # of capacity; nearer to it a queue has no length worth a forecast


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One replica: milliseconds of a batch (fixed, and of each image), of decoding and of the event loop."""

    fixed_ms: float
    each_ms: float
    largest: int
    decode_ms: float
    loop_ms: float
    decoders: int

    def batch_ms(self, images: int) -> float:
        """Return the milliseconds of a batch of so many *images*."""
        return self.fixed_ms + self.each_ms * images

    @property
    def limits(self) -> dict[str, float]:
        """Return what each stage can do at most, in images per second, by its name."""
        return {
            "engine": 1000 * self.largest / self.batch_ms(self.largest),
            "decoders": 1000 * self.decoders / self.decode_ms if self.decode_ms else math.inf,
            "event loop": 1000 / self.loop_ms if self.loop_ms else math.inf,
        }

    @property
    def capacity(self) -> float:
        """Return the images per second of the slowest stage."""
        return min(self.limits.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A replica at a rate: ms from arrival to answer, images of a mean batch, share of time at work."""

    mean_ms: float
    p50_ms: float
    p99_ms: float
    batch: float
    busy: float


def forecast(system: System, rate: float) -> Forecast:
    """Return what *system* does at *rate* images per second; raises `ValueError` at its capacity or above."""
    if not 0 < rate < system.capacity:
        raise ValueError(f"{rate:.1f} images/s: a replica can do {system.capacity:.1f}")
    step = system.batch_ms(system.largest) / GRID
    waiting = chain(system, rate / 1000)
    total = in_batcher(system, rate / 1000, waiting, step)
    for servers, service in ((system.decoders, system.decode_ms), (1, system.loop_ms)):
        total = np.convolve(total, delay(rate / 1000, servers, service, step))
    constant = system.decode_ms + system.loop_ms
    sizes = batch_sizes(waiting, system.largest)
    batch = float(sizes @ np.arange(system.largest + 1))
    return Forecast(
        mean_ms=constant + step * float(total @ np.arange(len(total))),
        p50_ms=constant + step * quantile(total, 0.5),
        p99_ms=constant + step * quantile(total, 0.99),
        batch=batch,
        busy=rate / 1000 * (system.fixed_ms + system.each_ms * batch) / batch,
    )


def chain(system: System, rate: float) -> Floats:
    """Return the probabilities of 0, 1, ... images waiting when a batch ends, at *rate* images per ms.

    From l images a batch of min(l, largest) begins, from none one of the next image alone; what arrives
    meanwhile is Poisson. More than `BEYOND` over a batch count as so many.
    """
    states = system.largest + BEYOND
    moves = np.zeros((states, states))
    for waiting in range(states):
        taken = min(max(waiting, 1), system.largest)
        left = max(waiting - system.largest, 0)
        arrivals = poisson(np.array([rate * system.batch_ms(taken)]), states - left)[0]
        moves[waiting, left:] = arrivals
        moves[waiting, -1] += 1 - arrivals.sum()
    balance = (moves - np.eye(states)).T
    balance[-1] = 1.0
    found: Floats = np.linalg.solve(balance, np.eye(states)[-1])
    return np.maximum(found, 0.0)


def batch_sizes(waiting: Floats, largest: int) -> Floats:
    """Return the probabilities of batches of 0, 1, ... *largest* images from those of *waiting* ones."""
    sizes = np.zeros(largest + 1)
    sizes[1:largest] = waiting[1:largest]
    sizes[1] += waiting[0]
    sizes[largest] += waiting[largest:].sum()
    return sizes


def in_batcher(system: System, rate: float, waiting: Floats, step: float) -> Floats:
    """Return the probabilities of 0, 1, ... *step*s from an image's arrival in the line to its batch's end.

    An image finds an idle engine, or a batch that has r to go and k images in line before its own. Then it
    waits for r and for k // largest full batches; its own batch holds the rest of k, itself, and what arrives
    until it begins.
    """
    ahead = found_ahead(system, rate, waiting, step)
    slots, states = ahead.shape
    remaining = (np.arange(slots) + 0.5) * step
    full = system.batch_ms(system.largest)
    ends = np.zeros(round(((states // system.largest + 3) * full) / step) + 1)
    ends[round(system.batch_ms(1) / step)] += waiting[0]
    for count in np.flatnonzero(ahead.sum(axis=0) > NEGLIGIBLE):
        batches, before = divmod(int(count), system.largest)
        starts = remaining + batches * full
        room = system.largest - before - 1
        joins = poisson(rate * starts, room + 1)
        joins[:, room] = np.maximum(1 - joins[:, :room].sum(axis=1), 0.0)
        own = system.fixed_ms + system.each_ms * (before + 1 + np.arange(room + 1))
        places = np.rint((starts[:, None] + own) / step).astype(np.int64)
        np.add.at(ends, places, ahead[:, count, None] * joins)
    found: Floats = ends / ends.sum()
    return found


def found_ahead(system: System, rate: float, waiting: Floats, step: float) -> Floats:
    """Return how often an arriving image finds (r in steps of time to go, k images before it), per batch."""
    states, largest = len(waiting), system.largest
    sizes = batch_sizes(waiting, largest)
    found = np.zeros((GRID, states))
    for size in range(1, largest + 1):
        length = system.batch_ms(size)
        slots = min(GRID, max(1, round(length / step)))
        passed = np.maximum(length - (np.arange(slots) + 0.5) * step, 0.0)
        counts = poisson(rate * passed, states)
        if size == largest:
            over = waiting[largest:].copy()
            over[0] += sizes[largest] - over.sum()  # where the largest batch is one image: of an idle engine
            counts = np.array([np.convolve(over, row)[:states] for row in counts])
        else:
            counts *= sizes[size]
        found[:slots] += rate * length / slots * counts
    return found


def delay(rate: float, servers: int, service: float, step: float) -> Floats:
    """Return the probabilities of waiting 0, 1, ... *step*s for one of *servers* that take *service* ms each.

    M/D/c: one has to wait with Erlang's probability C, and then longer than t with
    exp(-2 (1 - load) c t / service), twice as fast as with random service times (Tijms, A First Course in
    Stochastic Models, 9.6). For one server the mean, load * service / (2 (1 - load)), is exact.
    """
    if service == 0:
        return np.ones(1)
    load = rate * service / servers
    scale = service / (2 * (1 - load) * servers)
    length = min(20 * GRID, math.ceil(20 * scale / step) + 1)
    cell = step / scale
    cells = np.exp(-cell * np.arange(length)) * -math.expm1(-cell)
    found: Floats = np.zeros(length + 1)
    # A cell's mean lies within it: its mass is split between its two ends so that the mean of all is kept.
    inside = 1 / cell - 1 / math.expm1(cell)
    found[:-1] += cells * (1 - inside)
    found[1:] += cells * inside
    found *= erlang(load, servers)
    found[0] += 1 - found.sum()
    return found


def erlang(load: float, servers: int) -> float:
    """Return the probability that all of *servers* are at work (Erlang C), each for a share *load*."""
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = load * servers * blocked / (busy + load * servers * blocked)
    return blocked / (1 - load * (1 - blocked))


def poisson(means: Floats, count: int) -> Floats:
    """Return the probabilities of 0, 1, ... *count* - 1 events for each of *means*: (len(means), count)."""
    events = np.arange(count)
    logs = np.array([math.lgamma(event + 1) for event in events])
    found: Floats = np.exp(np.outer(np.log(np.maximum(means, 1e-300)), events) - means[:, None] - logs)
    return found


def quantile(probabilities: Floats, share: float) -> float:
    """Return where the sum of *probabilities* reaches *share*, in steps, in proportion between two."""
    sums = np.cumsum(probabilities)
    place = int(np.searchsorted(sums, share))
    below = float(sums[place - 1]) if place else 0.0
    return place - 0.5 + (share - below) / float(probabilities[place])
