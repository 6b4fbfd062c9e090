"""Queueing model of the latency of an image in a replica at a given rate; uses no measurements.

A replica has one runtime, in one process or behind several front ends. An image passes the interpreter lock
of its process (M/D/1), the decoders (M/D/c) and the batcher. The lock is held by the event loop, by a part of
each decoding and, in a single process, by the batcher. The batcher is work-conserving: an idle runtime takes
the waiting images, at most the largest batch, and a batch of n takes `fixed + each * n`. With Poisson
arrivals the number of waiting images at the end of each batch is a Markov chain. Batch sizes and times in the
batcher follow from it; the only approximation is the discrete time grid. The stages are assumed to be
independent, each with Poisson arrivals.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRID = 128  # time steps in the largest batch
BEYOND = 300  # states for images beyond a batch; more are very rare at 0.98 of the capacity
NEGLIGIBLE = 1e-12
MAX_LOAD = 0.98  # fraction of the capacity; above it the queue length is not predictable


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One replica: milliseconds per batch (fixed and per image), of decoding and of the event loop.

    Decoding holds the interpreter lock for *decode_lock_ms*, queue and batching for *batch_lock_ms*.
    *decoders* are the threads of each of the *front_ends*; 1 is a single process.
    """

    fixed_ms: float
    each_ms: float
    largest: int
    decode_ms: float
    loop_ms: float
    decoders: int
    decode_lock_ms: float = 0.0
    batch_lock_ms: float = 0.0
    front_ends: int = 1

    @property
    def lock_ms(self) -> float:
        """Milliseconds for which an image holds the lock of the process that receives it."""
        return self.loop_ms + self.decode_lock_ms + (self.batch_lock_ms if self.front_ends == 1 else 0.0)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of an image without the runtime."""
        return self.decode_ms + self.loop_ms + self.batch_lock_ms

    def batch_ms(self, images: int) -> float:
        """Compute the milliseconds of a batch of *images* images."""
        return self.fixed_ms + self.each_ms * images

    @property
    def limits(self) -> dict[str, float]:
        """Maximum images per second of each stage, by name."""
        return {
            "engine": 1000 * self.largest / self.batch_ms(self.largest),
            "decoders": self.front_ends * per_second(self.decode_ms / self.decoders),
            "interpreter lock": self.front_ends * per_second(self.lock_ms),
            **({"engine process": per_second(self.batch_lock_ms)} if self.front_ends > 1 else {}),
        }

    @property
    def capacity(self) -> float:
        """Images per second of the slowest stage."""
        return min(self.limits.values())


def per_second(milliseconds: float) -> float:
    """Convert a duration of *milliseconds* to operations per second."""
    return 1000 / milliseconds if milliseconds else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Forecast for a replica at a rate: latency in ms, mean batch size, utilization of the runtime."""

    mean_ms: float
    p50_ms: float
    p99_ms: float
    batch: float
    busy: float


def forecast(system: System, rate: float) -> Forecast:
    """Predict *system* at *rate* images per second; raises `ValueError` at or above its capacity."""
    if not 0 < rate < system.capacity:
        raise ValueError(
            f"{rate:.1f} images/s: a replica has a capacity of {system.capacity:.1f}; give a rate below it"
        )
    step = system.batch_ms(system.largest) / GRID
    waiting = chain(system, rate / 1000)
    total = in_batcher(system, rate / 1000, waiting, step)
    each = rate / 1000 / system.front_ends
    busy_ms = min(system.decode_ms + lock_wait(system, each), MAX_LOAD * system.decoders / each)
    for servers, service in ((system.decoders, busy_ms if system.decode_ms else 0.0), (1, system.lock_ms)):
        total = np.convolve(total, delay(each, servers, service, step))
    constant = system.cpu_ms
    sizes = batch_sizes(waiting, system.largest)
    batch = float(sizes @ np.arange(system.largest + 1))
    return Forecast(
        mean_ms=constant + step * float(total @ np.arange(len(total))),
        p50_ms=constant + step * quantile(total, 0.5),
        p99_ms=constant + step * quantile(total, 0.99),
        batch=batch,
        busy=rate / 1000 * (system.fixed_ms + system.each_ms * batch) / batch,
    )


def lock_wait(system: System, rate: float) -> float:
    """Compute the mean ms that a decoder waits for the lock, for *rate* images per ms and process.

    An image takes the lock up to three times and waits each time as in M/G/1 (Pollaczek-Khinchine).
    """
    if not system.decode_lock_ms:
        return 0.0
    batch_ms = system.batch_lock_ms if system.front_ends == 1 else 0.0
    squares = sum(held**2 for held in (system.loop_ms, system.decode_lock_ms, batch_ms))
    return rate * squares / (2 * (1 - rate * system.lock_ms))


def chain(system: System, rate: float) -> Floats:
    """Compute the probabilities of 0, 1, ... waiting images at the end of a batch, for *rate* images per ms.

    With w waiting images, the next batch has min(w, largest) images; with none, it consists of the next
    image. Arrivals during a batch are Poisson. States beyond `BEYOND` are combined.
    """
    states = system.largest + BEYOND
    moves = np.zeros((states, states))
    durations = np.array([system.batch_ms(taken) for taken in range(1, system.largest + 1)])
    arrivals_of = poisson(rate * durations, states)
    for waiting in range(states):
        taken = min(max(waiting, 1), system.largest)
        left = max(waiting - system.largest, 0)
        arrivals = arrivals_of[taken - 1, : states - left]
        moves[waiting, left:] = arrivals
        moves[waiting, -1] += 1 - arrivals.sum()
    balance = (moves - np.eye(states)).T
    balance[-1] = 1.0
    found: Floats = np.linalg.solve(balance, np.eye(states)[-1])
    return np.maximum(found, 0.0)


def batch_sizes(waiting: Floats, largest: int) -> Floats:
    """Compute the probabilities of batch sizes 0, 1, ... *largest* from those of *waiting* images."""
    sizes = np.zeros(largest + 1)
    sizes[1:largest] = waiting[1:largest]
    sizes[1] += waiting[0]
    sizes[largest] += waiting[largest:].sum()
    return sizes


def in_batcher(system: System, rate: float, waiting: Floats, step: float) -> Floats:
    """Compute the probabilities of 0, 1, ... *step*s from an image's arrival in the queue to its batch's end.

    If the runtime is idle, the image forms a batch alone. Otherwise the running batch has a remaining time r,
    and k images are queued before this one. Then the image waits for r and for k // largest full batches. Its
    own batch contains the other k % largest queued images, the image, and arrivals until the batch starts.
    """
    ahead = found_ahead(system, rate, waiting, step)
    slots, states = ahead.shape
    remaining = (np.arange(slots, dtype=np.float64) + 0.5) * step
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
    """Count, per batch, how often an arriving image finds remaining time r (in steps) and k queued images."""
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
            over[0] += sizes[largest] - over.sum()  # batches that begin on an idle runtime, if *largest* is 1
            counts = np.array([np.convolve(over, row)[:states] for row in counts])
        else:
            counts *= sizes[size]
        found[:slots] += rate * length / slots * counts
    return found


def delay(rate: float, servers: int, service: float, step: float) -> Floats:
    """Compute the probabilities of waiting 0, 1, ... *step*s for one of *servers*, each with *service* ms.

    M/D/c: an arrival waits with Erlang's probability C, and then longer than t with probability
    exp(-2 (1 - load) c t / service), half as long as with random service times (Tijms, A First Course in
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
    # The probability of each cell is split between its two ends so that the mean does not change.
    inside = 1 / cell - 1 / math.expm1(cell)
    found[:-1] += cells * (1 - inside)
    found[1:] += cells * inside
    found *= erlang(load, servers)
    found[0] += 1 - found.sum()
    return found


def erlang(load: float, servers: int) -> float:
    """Compute the probability that all *servers* are busy (Erlang C) if each has the utilization *load*."""
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = load * servers * blocked / (busy + load * servers * blocked)
    return blocked / (1 - load * (1 - blocked))


def poisson(means: Floats, count: int) -> Floats:
    """Compute the probabilities of 0, 1, ... *count* - 1 events for each of *means*, (len(means), count)."""
    logs = np.outer(np.log(np.maximum(means, 1e-300)), np.arange(count))
    found: Floats = np.exp(logs - means[:, None] - log_factorials(count))
    return found


@functools.cache
def log_factorials(count: int) -> Floats:
    """Compute the logarithms of 0!, 1!, ... (*count* - 1)!."""
    return np.array([math.lgamma(event + 1) for event in range(count)])


def quantile(probabilities: Floats, share: float) -> float:
    """Compute the quantile *share* of *probabilities* in steps, with linear interpolation."""
    sums = np.cumsum(probabilities)
    place = int(np.searchsorted(sums, share))
    below = float(sums[place - 1]) if place else 0.0
    return place - 0.5 + (share - below) / float(probabilities[place])
