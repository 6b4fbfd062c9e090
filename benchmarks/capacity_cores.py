"""Images per second of a machine by its number of cores, with one process and with front ends.

    python benchmarks/capacity_cores.py

Computes the slowest of four stages: the cores, the interpreter lock of each process, the engine process and
the engine. docs/scaling.md explains the inputs and contains the table.
"""

import math
from dataclasses import dataclass

from capacity_model import System
from measure import Result, parse, report

CORES = (4, 8, 16, 32)
ENGINE = 10_000  # images/s: a ResNet-50 in half precision on an H200
BATCH_MS = 0.016  # CPU of queue and batching per image, with the interpreter lock
FRONT_END_MS = 0.11  # additional CPU of an image that passes two processes, on busy cores
CORES_PER_FRONT_END, MOST_FRONT_ENDS = 4, 8  # `front_ends = auto`


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """CPU milliseconds per image of one kind: decoding, its part with the lock, and the event loop."""

    name: str
    decode_ms: float
    decode_lock_ms: float
    loop_ms: float


INPUTS = (
    Input(name="JPEG 500 x 375", decode_ms=2.64, decode_lock_ms=0.19, loop_ms=0.2),
    Input(name="JPEG, nvImageCodec", decode_ms=0.3, decode_lock_ms=0.1, loop_ms=0.2),
    Input(name="uint8 tensor over V2", decode_ms=0.0, decode_lock_ms=0.0, loop_ms=0.38),
)


def throughput(given: Input, cores: int, front_ends: int) -> tuple[float, str]:
    """Compute images/s of *given* on *cores* and the stage that limits them."""
    system = System(
        fixed_ms=0.0,
        each_ms=1000 / ENGINE,
        largest=1,
        decode_ms=given.decode_ms,
        loop_ms=given.loop_ms + (FRONT_END_MS if front_ends > 1 else 0.0),
        decoders=cores,
        decode_lock_ms=given.decode_lock_ms,
        batch_lock_ms=BATCH_MS,
        front_ends=front_ends,
    )
    limits = {**system.limits, "cores": 1000 * cores / system.cpu_ms}
    del limits["decoders"]  # as many as needed
    stage = min(limits, key=limits.__getitem__)
    return limits[stage], stage


def rows() -> list[str]:
    """Format the table as Markdown."""
    lines = [
        "| input | cores | one process | limit | front ends | images/s | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for given in INPUTS:
        for cores in CORES:
            alone, first = throughput(given, cores, 1)
            count = front_ends_of(cores)
            several, second = throughput(given, cores, count)
            cells = (given.name, cores, rounded(alone), first, count, rounded(several), second)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def front_ends_of(cores: int) -> int:
    """Compute what `front_ends = auto` chooses on *cores*."""
    return max(1, min(MOST_FRONT_ENDS, cores // CORES_PER_FRONT_END))


def rounded(value: float) -> str:
    """Format *value* with two digits, the precision of the inputs."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.0f}"


def main() -> None:
    """Run from the command line."""
    arguments = parse(__doc__)
    if not arguments.json:
        print(*rows(), sep="\n")
        return
    found = [
        Result(
            case=f"{given.name}, {cores} cores, {count} front ends",
            against="one process",
            ours=throughput(given, cores, count)[0],
            other=throughput(given, cores, 1)[0],
            unit="images/s",
            runs=1,
        )
        for given in INPUTS
        for cores in CORES
        for count in [front_ends_of(cores)]
    ]
    report(found, as_json=True)


if __name__ == "__main__":
    main()
