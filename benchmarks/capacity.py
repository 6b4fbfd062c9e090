"""Replicas, cores and Gbit/s for a rate of images, and images per second of a machine by its cores.

    python benchmarks/capacity.py --engine 2,0.4 --batch 32 --decode-ms 2.64 --p99-ms 50
    python benchmarks/capacity.py --machine

A replica has one runtime. A batch of n images takes a + b n ms (`--engine a,b`). The capacity of a replica is
that of its slowest stage: runtime, decoders, or the interpreter lock, which the event loop and a part of
decoding hold. docs/scaling.md explains the inputs and contains both tables.
"""

import argparse
import math
from dataclasses import dataclass, replace

import numpy as np
from measure import make_parser
from numpy.typing import NDArray
from scipy.stats import poisson

from sopdeploy_service.settings import decoders_per_process

Floats = NDArray[np.float64]

QUEUED = 300  # states for waiting images beyond a batch; more are very rare below `MAX_LOAD`
STEPS = 128  # time steps of the largest batch
MAX_LOAD = 0.98  # fraction of the capacity above which the queue length is not predictable
HEAD = (
    "| images/s | replicas | images/s each | batch | p50 ms | p99 ms | p99 ms, one lost | cores | Gbit/s in "
    "| held each |\n|---|---|---|---|---|---|---|---|---|---|"
)
MACHINE_HEAD = (
    "| input | cores | one process | limit | front ends | images/s | limit |\n|---|---|---|---|---|---|---|"
)
BATCH_MS = 0.016  # queue and batching of an image, with the interpreter lock
SEND_MS, INFERENCE_MS = 0.1, 0.11  # an image of a front end: sending it; the inference process, with its lock


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """Milliseconds of a batch (fixed, and per image), of decoding an image and of its event loop.

    Decoding holds the interpreter lock for *decode_lock_ms*. *decoders* are the threads of each of the
    *front_ends*; 1 is a single process. *engine_cores* are the threads of a CPU runtime.
    """

    fixed_ms: float
    each_ms: float
    largest: int
    decode_ms: float
    decode_lock_ms: float
    loop_ms: float
    decoders: int = 1
    front_ends: int = 1
    engine_cores: float = 0.0

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of an image without the runtime."""
        batching = BATCH_MS if self.front_ends == 1 else SEND_MS + INFERENCE_MS
        return self.decode_ms + self.loop_ms + batching

    def batch_ms(self, images: int) -> float:
        """Compute the milliseconds of a batch of *images* images."""
        return self.fixed_ms + self.each_ms * images

    @property
    def limits(self) -> dict[str, float]:
        """Images per second of each stage, by name."""
        single_process = self.front_ends == 1
        lock_ms = self.loop_ms + self.decode_lock_ms + (BATCH_MS if single_process else SEND_MS)
        limits = {
            "engine": 1000 * self.largest / self.batch_ms(self.largest),
            "interpreter lock": 1000 * self.front_ends / lock_ms,
        }
        if self.decode_ms:
            limits["decoders"] = 1000 * self.front_ends * self.decoders / self.decode_ms
        return limits if single_process else limits | {"inference process": 1000 / INFERENCE_MS}

    @property
    def capacity(self) -> float:
        """Images per second of the slowest stage."""
        return min(self.limits.values())

    @property
    def cores(self) -> float:
        """Busy cores at capacity, rounded up to a tenth."""
        return math.ceil(10 * (self.engine_cores + self.capacity * self.cpu_ms / 1000) - 1e-9) / 10

    def with_decoders(self) -> "Replica":
        """Add as many decoders as the slower of runtime and interpreter lock needs."""
        rate = replace(self, decode_ms=0.0).capacity / self.front_ends
        return replace(self, decoders=max(1, math.ceil(rate * self.decode_ms / 1000)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Latency in ms and mean batch size of a replica."""

    mean_ms: float
    p50_ms: float
    p99_ms: float
    batch: float


def forecast(replica: Replica, rate: float) -> Forecast:
    """Predict *replica* at *rate* images per second; raises `ValueError` at or above its capacity.

    An idle runtime takes the waiting images, at most the largest batch. Arrivals are Poisson, so the number
    of waiting images at the ends of batches is a Markov chain. Waiting for decoders and the interpreter lock
    is not included.
    """
    if not 0 < rate < replica.capacity:
        raise ValueError(
            f"{rate:.1f} images/s: a replica has a capacity of {replica.capacity:.1f}; lower the rate"
        )
    per_ms, step = rate / 1000, replica.batch_ms(replica.largest) / STEPS
    waiting_W = stationary(replica, per_ms)
    ends = time_in_batcher(replica, per_ms, waiting_W, step)
    sizes = np.clip(np.arange(len(waiting_W)), 1, replica.largest)
    sums = np.cumsum(ends)
    median, high = (float(np.searchsorted(sums, share)) for share in (0.5, 0.99))
    return Forecast(
        mean_ms=replica.cpu_ms + step * float(ends @ np.arange(len(ends))),
        p50_ms=replica.cpu_ms + step * median,
        p99_ms=replica.cpu_ms + step * high,
        batch=float(sizes @ waiting_W),
    )


def stationary(replica: Replica, per_ms: float) -> Floats:
    """Compute the probabilities of 0, 1, ... waiting images at the end of a batch."""
    largest, states = replica.largest, replica.largest + QUEUED
    moves = np.zeros((states, states))
    for waiting in range(states):
        taken, left = min(max(waiting, 1), largest), max(waiting - largest, 0)
        moves[waiting, left:] = poisson.pmf(np.arange(states - left), per_ms * replica.batch_ms(taken))
        moves[waiting, -1] += 1 - moves[waiting].sum()
    balance = (moves - np.eye(states)).T
    balance[-1] = 1.0
    probabilities: Floats = np.linalg.solve(balance, np.eye(states)[-1])
    return np.maximum(probabilities, 0.0)


def time_in_batcher(replica: Replica, per_ms: float, waiting_W: Floats, step: float) -> Floats:
    """Compute the probabilities of 0, 1, ... *step*s from an image's arrival in the queue to its batch's end.

    If the runtime is idle, the image forms a batch alone. Otherwise the running batch needs r more ms, and k
    images wait already. Then the image waits for r and for k // largest full batches. Its own batch contains
    the other k % largest images, the image itself, and those that arrive until it starts.
    """
    largest, states = replica.largest, len(waiting_W)
    # Mean number of images per batch that arrive when r = (T + 0.5) steps and k images are ahead of them.
    ahead_TK = np.zeros((STEPS, states))
    for before in np.flatnonzero(waiting_W > 1e-9):  # waiting images when the running batch began
        size, left = min(max(int(before), 1), largest), max(int(before) - largest, 0)
        length = replica.batch_ms(size)
        slots = min(STEPS, max(1, round(length / step)))
        passed_T = np.maximum(length - (np.arange(slots) + 0.5) * step, 0.0)
        arrived_TK = poisson.pmf(np.arange(states - left), per_ms * passed_T[:, None])
        ahead_TK[:slots, left:] += waiting_W[before] * per_ms * length / slots * arrived_TK
    ends = np.zeros(round((states // largest + 3) * replica.batch_ms(largest) / step) + 1)
    ends[round(replica.batch_ms(1) / step)] += waiting_W[0]
    for count in np.flatnonzero(ahead_TK.sum(axis=0) > 1e-9):
        batches, companions = divmod(int(count), largest)
        starts_T = (np.arange(STEPS) + 0.5) * step + batches * replica.batch_ms(largest)
        room = largest - companions - 1
        joins_TR = poisson.pmf(np.arange(room + 1), per_ms * starts_T[:, None])
        joins_TR[:, room] = np.maximum(1 - joins_TR[:, :room].sum(axis=1), 0.0)
        own_R = replica.fixed_ms + replica.each_ms * (companions + 1 + np.arange(room + 1))
        end_steps = np.rint((starts_T[:, None] + own_R) / step).astype(np.int64)
        np.add.at(ends, end_steps, ahead_TK[:, count, None] * joins_TR)
    probabilities: Floats = ends / ends.sum()
    return probabilities


def highest_rate(replica: Replica, p99_ms: float) -> float:
    """Compute the highest rate at which a replica meets *p99_ms*; raises `ValueError` if there is none."""
    low, high = 0.0, MAX_LOAD * replica.capacity
    if forecast(replica, high).p99_ms <= p99_ms:
        return high
    for _ in range(12):  # to 1/4,000 of the capacity
        middle = (low + high) / 2
        low, high = (middle, high) if forecast(replica, middle).p99_ms <= p99_ms else (low, middle)
    if low == 0.0:
        fastest = replica.cpu_ms + replica.batch_ms(1)
        raise ValueError(
            f"p99 of {p99_ms:g} ms is impossible: an image takes {fastest:.1f} ms without waiting, "
            "and some images wait for a running batch; allow a larger p99"
        )
    return low


def plan(replica: Replica, rates: list[float], p99_ms: float, headroom: float, kilobytes: float) -> list[str]:
    """Compute a row of the table for each of *rates*: the fewest replicas for *headroom* and for *p99_ms*.

    The p99 also holds after the loss of one replica. Raises `ValueError` if no number of replicas meets it.
    """
    most, rows = highest_rate(replica, p99_ms), []
    for rate in rates:
        count = max(math.ceil(rate / (replica.capacity * (1 - headroom))), math.ceil(rate / most) + 1)
        rate_each = rate / count
        usual, after_loss = forecast(replica, rate_each), forecast(replica, rate / (count - 1))
        cells = (
            f"{rate:,.0f}",
            f"{count:,}",
            f"{rate_each:,.1f}",
            *(f"{value:.1f}" for value in (usual.batch, usual.p50_ms, usual.p99_ms, after_loss.p99_ms)),
            f"{count * replica.cores:,.1f}",
            f"{rate * kilobytes * 8 / 1e6:,.2f}",
            f"{rate_each * usual.mean_ms / 1000:.1f}",  # Little's law
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def machine() -> list[str]:
    """Compute images/s by input and cores for a GPU that runs 10,000 images/s."""
    inputs = {  # ms of decoding, of its part with the lock, and of the event loop
        "JPEG 500 x 375": (2.64, 0.19, 0.28),
        "uint8 tensor over V2": (0.0, 0.0, 0.46),
    }
    rows = []
    for name, (decode_ms, decode_lock_ms, loop_ms) in inputs.items():
        for cores in (4, 8, 16, 32):
            cells: list[object] = [name, cores]
            automatic = max(1, min(8, cores // 4))  # the setting front_ends = auto
            for front_ends in (1, automatic):
                replica = Replica(
                    fixed_ms=0.0,
                    each_ms=0.1,
                    largest=1,
                    decode_ms=decode_ms,
                    decode_lock_ms=decode_lock_ms,
                    loop_ms=loop_ms,
                    decoders=decoders_per_process(cores, front_ends),
                    front_ends=front_ends,
                )
                limits = replica.limits | {"cores": 1000 * cores / replica.cpu_ms}
                stage = min(limits, key=limits.__getitem__)
                cells += [f"{float(f'{limits[stage]:.2g}'):,.0f}", stage]
            cells.insert(4, automatic)
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def numbers(text: str) -> list[float]:
    """Convert comma-separated numbers, as `type` of an option."""
    values = [float(part) for part in text.split(",")]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: give numbers of at least 0")
    return values


def main(words: list[str] | None = None) -> None:
    """Run from the command line; *words* are its arguments."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "--machine", action="store_true", help="print the table of one machine by its cores, and nothing else"
    )
    add("--rate", type=numbers, default=[1e2, 1e3, 1e4, 1e5, 1e6], help="images per second")
    add("--engine", type=numbers, default=[2.0, 0.4], help="ms per batch and per image")
    add("--batch", type=int, default=32, help="images in the largest batch")
    add("--decode-ms", type=float, default=2.64, help="CPU ms of decoding an image")
    add("--decode-lock-ms", type=float, default=0.19, help="part of it with Python's lock")
    add("--loop-ms", type=float, default=0.28, help="CPU ms per request without decoding")
    add("--front-ends", type=int, default=1, help="front ends per runtime")
    add("--engine-cores", type=float, default=0.0, help="threads of a CPU runtime")
    add("--kilobytes", type=float, default=52.6, help="size of an image")
    add("--p99-ms", type=float, default=50.0, help="required p99 after the loss of one replica")
    add("--headroom", type=float, default=0.3, help="fraction of the capacity to keep free")
    given = parser.parse_args(words)
    if given.machine:
        print(MACHINE_HEAD, *machine(), sep="\n")
        return
    try:
        fixed, each = given.engine
        replica = Replica(
            fixed_ms=fixed,
            each_ms=each,
            largest=given.batch,
            decode_ms=given.decode_ms,
            decode_lock_ms=given.decode_lock_ms,
            loop_ms=given.loop_ms,
            front_ends=given.front_ends,
            engine_cores=given.engine_cores,
        ).with_decoders()
        rows = plan(replica, given.rate, given.p99_ms, given.headroom, given.kilobytes)
    except ValueError as error:
        parser.error(str(error))
    limits = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in replica.limits.items())
    print(f"one replica: {replica.decoders} decoders, {replica.cores} cores; images/s at most: {limits}\n")
    print(HEAD, *rows, sep="\n")


if __name__ == "__main__":
    main()
