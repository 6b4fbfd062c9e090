"""Images per second of a server on more cores than this machine has, from the CPU times of its processes.

`simulate` plays a closed loop: each of `CONNECTIONS` sends its next image when the last one is answered. An
image needs the event loop of its front end, one of its decoders, and the engine, one after the other, each
for a random time (exponential) with the measured mean, and a core meanwhile. What several cores share, such
as memory, is not part of it.
"""

import heapq
import random
from collections import deque
from typing import NamedTuple

CORES, CONNECTIONS, IMAGES = 16, 256, 20_000
FRONT_ENDS = CORES // 4  # as `serve` chooses


class Costs(NamedTuple):
    """CPU milliseconds of an image in the processes of a server."""

    front_end: float
    decoder: float
    engine: float


def simulate(costs: Costs) -> float:
    """Return the images per second of a server with *costs* on `CORES`."""
    rng = random.Random(0)  # noqa: S311 - a simulation
    front_ends, decoders, engine = range(FRONT_ENDS), range(FRONT_ENDS, 2 * FRONT_ENDS), 2 * FRONT_ENDS
    free = [1] * FRONT_ENDS + [CORES // FRONT_ENDS] * FRONT_ENDS + [1]  # processes by station
    means = [costs.front_end] * FRONT_ENDS + [costs.decoder] * FRONT_ENDS + [costs.engine]
    waiting: list[deque[int]] = [deque() for _ in free]  # connections by station
    for connection in range(CONNECTIONS):
        waiting[front_ends[connection % FRONT_ENDS]].append(connection)
    running: list[tuple[float, int, int]] = []  # end, station, connection
    now, answered, first = 0.0, 0, 0
    while answered < IMAGES:
        for station in range(first, first + len(free)):  # none is always the first to get a core
            station %= len(free)
            while waiting[station] and free[station] and len(running) < CORES:
                free[station] -= 1
                end = now + rng.expovariate(1 / means[station])
                heapq.heappush(running, (end, station, waiting[station].popleft()))
        first += 1
        now, station, connection = heapq.heappop(running)
        free[station] += 1
        answered += station == engine
        if station == engine:
            following = front_ends[connection % FRONT_ENDS]
        else:
            following = decoders[station] if station in front_ends else engine
        waiting[following].append(connection)
    return 1000 * answered / now
