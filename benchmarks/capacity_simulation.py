"""Discrete-event simulation of replicas behind a load balancer, to verify `capacity_model`.

A replica admits an image, or rejects it if the replica is full, and assigns it to a random front end. There,
the image holds the interpreter lock for the event loop, then for a part of its decoding in one of the
decoders. Then it waits for the runtime, which takes the waiting images when it is idle. Queues are first come
first served, service times are constant. Arrivals are a Poisson stream, or clients that send the next image
after each response. Times are ms.
"""

import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from capacity_model import System

Route: TypeAlias = Literal["random", "round-robin", "least-loaded"]

RETRY_MS = 1000.0  # pause of a rejected client before it retries, as in the server's Retry-After


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of *images* images on *replica*.

    *oldest* is the arrival of its oldest image in the queue, *left* the number of images that stay queued.
    """

    replica: int
    start: float
    end: float
    oldest: float
    images: int
    left: int


@dataclass(slots=True)
class Outcome:
    """The results of all images; *answered* contains the times (arrival, response)."""

    sent: int = 0
    refused: int = 0
    lost: int = 0
    answered: list[tuple[float, float]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def measured(self, since: float, until: float = float("inf")) -> "Figures":
        """Compute the statistics of images that arrived between *since* and *until*."""
        answers = [(came, gone) for came, gone in self.answered if since <= came < until]
        times = sorted(gone - came for came, gone in answers)
        span = max(gone for _, gone in answers) - min(gone for _, gone in answers)
        sizes = [batch.images for batch in self.batches if since <= batch.start < until]
        return Figures(
            images_per_s=1000 * (len(times) - 1) / span,
            mean_ms=statistics.fmean(times),
            p50_ms=statistics.median(times),
            p99_ms=times[int(0.99 * (len(times) - 1))],
            batch=statistics.fmean(sizes),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Statistics: images per second of all replicas, latencies in milliseconds, mean batch size."""

    images_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    batch: float


@dataclass(slots=True)
class Replica:
    """Front ends, images that wait for the runtime, and number of images held."""

    fronts: "list[FrontEnd]"
    waiting: deque[tuple[float, float]] = field(default_factory=deque)  # arrivals: at the server, here
    working: bool = False
    held: int = 0
    up: bool = True


@dataclass(slots=True)
class FrontEnd:
    """Idle decoders, the time at which the interpreter lock is free, and arrivals that wait for a decoder."""

    idle: int
    lock: float = 0.0
    waiting: deque[float] = field(default_factory=deque)

    def hold(self, now: float, milliseconds: float) -> float:
        """Hold the lock for *milliseconds* as soon as it is free; return the time at which it is released."""
        self.lock = max(now, self.lock) + milliseconds
        return self.lock


class Simulation:
    """Simulates *replicas* of *system* with at most *held* images each; reproducible for the same *seed*."""

    def __init__(
        self, system: System, *, replicas: int = 1, route: Route = "random", held: int = 256, seed: int = 0
    ) -> None:
        self.outcome = Outcome()
        self._system = system
        self._replicas = [
            Replica([FrontEnd(system.decoders) for _ in range(system.front_ends)]) for _ in range(replicas)
        ]
        self._up = list(range(replicas))
        self._held = held
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._turn = 0
        ways: dict[Route, Callable[[], int]] = {
            "random": lambda: self._random.choice(self._up),
            "round-robin": self._next_in_turn,
            "least-loaded": lambda: min(self._up, key=lambda number: self._replicas[number].held),
        }
        self._choose = ways[route]
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._scheduled = 0
        self._left = 0  # images still to be sent
        self._gap: float | None = None  # mean pause of a Poisson stream; None: closed loop

    def poisson(self, rate: float, images: int, lose_at: float | None = None) -> Outcome:
        """Send *images* images at *rate* per second and run to the end; replica 0 is lost at *lose_at* ms."""
        self._left, self._gap = images, 1000 / rate
        if lose_at is not None:
            self._at(lose_at, self._lose, 0)
        self._at(self._random.expovariate(1 / self._gap), self._arrive)
        return self._play()

    def closed_loop(self, clients: int, images: int) -> Outcome:
        """Run *clients* that send the next image after each response, *images* in total."""
        self._left = images
        for _ in range(clients):
            self._at(0.0, self._arrive)
        return self._play()

    def _play(self) -> Outcome:
        while self._events:
            now, _, action, given = heapq.heappop(self._events)
            action(now, *given)
        return self.outcome

    def _at(self, time: float, action: Callable[..., None], *given: object) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (time, self._scheduled, action, given))

    def _next_in_turn(self) -> int:
        self._turn += 1
        return self._up[self._turn % len(self._up)]

    def _arrive(self, now: float) -> None:
        if not self._left:
            return
        self._left -= 1
        self.outcome.sent += 1
        if self._gap is not None:
            self._at(now + self._random.expovariate(1 / self._gap), self._arrive)
        number = self._choose()
        replica = self._replicas[number]
        if replica.held >= self._held:
            self.outcome.refused += 1
            self._send_again(now + RETRY_MS)
            return
        replica.held += 1
        front = self._random.choice(replica.fronts) if len(replica.fronts) > 1 else replica.fronts[0]
        self._at(front.hold(now, self._system.loop_ms), self._received, number, front, now)

    def _received(self, now: float, number: int, front: FrontEnd, came: float) -> None:
        front.waiting.append(came)
        if front.idle:
            front.idle -= 1
            self._decode(now, number, front)

    def _decode(self, now: float, number: int, front: FrontEnd) -> None:
        came, locked = front.waiting.popleft(), self._system.decode_lock_ms
        decoded = front.hold(now, locked) + self._system.decode_ms - locked
        self._at(decoded, self._decoded, number, front, came)

    def _decoded(self, now: float, number: int, front: FrontEnd, came: float) -> None:
        if front.waiting:
            self._decode(now, number, front)
        else:
            front.idle += 1
        locked = self._system.batch_lock_ms
        queued = front.hold(now, locked) if self._system.front_ends == 1 and locked else now + locked
        self._at(queued, self._queued, number, came)

    def _queued(self, now: float, number: int, came: float) -> None:
        replica = self._replicas[number]
        if not replica.up:
            return
        replica.waiting.append((came, now))
        if not replica.working:
            self._take(now, number)

    def _take(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        oldest = replica.waiting[0][1]
        count = min(self._system.largest, len(replica.waiting))
        arrivals = [replica.waiting.popleft()[0] for _ in range(count)]
        replica.working = True
        end = now + self._system.batch_ms(count)
        self.outcome.batches.append(Batch(number, now, end, oldest, count, len(replica.waiting)))
        self._at(end, self._answer, number, arrivals)

    def _answer(self, now: float, number: int, arrivals: list[float]) -> None:
        replica = self._replicas[number]
        if not replica.up:
            return
        replica.held -= len(arrivals)
        replica.working = False
        for came in arrivals:
            self.outcome.answered.append((came, now))
            self._send_again(now)
        if replica.waiting:
            self._take(now, number)

    def _send_again(self, time: float) -> None:
        if self._gap is None:
            self._at(time, self._arrive)

    def _lose(self, now: float, number: int) -> None:  # noqa: ARG002 - every event has a time
        replica = self._replicas[number]
        replica.up = False
        self._up.remove(number)
        self.outcome.lost += replica.held
        replica.held = 0
