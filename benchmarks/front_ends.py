"""Front ends and an inference process (`front_ends` above 1) against one process, with simulated runtimes.

    python benchmarks/front_ends.py --rounds 5 --json

- `CPU per image`: all processes of the server, without decoding and inference. Every front end has as many
  connections as the single process, 32. With half of them, a process would receive fewer images at a time and
  need more CPU time for each.
- `p50 at light load`: one connection.
- `images/s with an emulated GIL load`: a decoder sleeps (C code without the interpreter lock) and then spins
  (Python with it), so the cores of the machine do not limit it. 4 front ends with 4 decoders each, against
  the best number of decoders in one process.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from load import put_load
from measure import Result, make_parser, report
from serving_alone import write_images
from serving_peers import cpu_seconds
from simulated_server import Server, running

BATCH = "5,0,32"  # every batch takes 5 ms and has at most 32 images
DECODE_MS = 2.1  # a JPEG of 500 x 375
CONNECTIONS = 32  # per process under load
ONE, FRONT_ENDS = "1 process", "2 front ends"
SETTINGS: dict[str, Any] = {"queue_size": 1024, "max_batch": 32, "decoders": 4, "sandbox": "off"}
SIDES: dict[str, tuple[dict[str, Any], int]] = {  # settings, connections
    ONE: ({"devices": "cpu"}, CONNECTIONS),
    FRONT_ENDS: ({"front_ends": 2}, 2 * CONNECTIONS),
}


def images_of(server: Server) -> float:
    """Read the number of images that were classified."""
    return sum(server.samples("sopdeploy_batch_size_sum").values())


def cpu_of(server: Server) -> float:
    """Measure the CPU seconds of all processes."""
    processes = server.processes() + server.processes(inference=True)
    return sum(cpu_seconds(process) for process in processes)


def cpu_and_latency(side: str, folder: Path, seconds: float) -> tuple[float, float]:
    """Measure CPU ms per image of all processes under load, and p50 in ms with one connection."""
    settings, connections = SIDES[side]
    with running({**SETTINGS, **settings}, BATCH) as server:
        url = f"{server.url}/v1/classify"
        put_load(url, folder, 0.1, "--connections", connections)
        images, spent = images_of(server), cpu_of(server)
        put_load(url, folder, seconds, "--connections", connections)
        per_image = 1000 * (cpu_of(server) - spent) / (images_of(server) - images)
        return per_image, put_load(url, folder, seconds, "--connections", 1).p50_ms


def emulated(front_ends: int, decoders: int, folder: Path, seconds: float) -> float:
    """Measure images/s with decoders that sleep and spin."""
    processes = {"devices": "cpu"} if front_ends == 1 else {"front_ends": front_ends}
    with running({**SETTINGS, **processes, "decoders": decoders}, "0,0,32", DECODE_MS) as server:
        return put_load(f"{server.url}/v1/classify", folder, seconds, "--connections", 64).images_per_s


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    rounds, seconds = arguments.rounds, arguments.seconds
    sides: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    best, four = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        for _ in range(rounds):
            for side, measured in sides.items():
                measured.append(cpu_and_latency(side, folder, seconds))
            best.append(max(emulated(1, decoders, folder, seconds) for decoders in (4, 8, 16)))
            four.append(emulated(4, 4, folder, seconds))
    results = [
        Result(
            case=f"{figure}, {FRONT_ENDS}",
            against=ONE,
            ours=statistics.median(values[column] for values in sides[FRONT_ENDS]),
            other=statistics.median(values[column] for values in sides[ONE]),
            unit=unit,
            runs=rounds,
        )
        for column, (figure, unit) in enumerate((("CPU per image", "cpu-ms"), ("p50 at light load", "ms")))
    ]
    results.append(
        Result(
            case="emulated GIL load, 4 front ends x 4 decoders",
            against="best single process",
            ours=statistics.median(four),
            other=statistics.median(best),
            unit="images/s",
            runs=rounds,
        )
    )
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
