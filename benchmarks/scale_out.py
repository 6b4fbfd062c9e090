"""Throughput and CPU cost of replicas on Ray, compared with one plain process.

    python benchmarks/scale_out.py --quick
    python benchmarks/scale_out.py --rounds 5

All servers use simulated runtimes that sleep, so two cores are enough for three of them. Every round
measures the plain process, one replica and two replicas alternately; a value is the median of the rounds'
ratios to the plain process of the same round. `slow`: 100 + 50 n ms for n images, at most 8: almost no
CPU time, so the ratio shows the cost of routing and batching. `batching`: 20 + 10 n. `fast`: 20 + 2
n, at most 32, limited by the CPU on few cores. CPU is the time of the whole process tree per image.
Needs `sopdeploy[ray]`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import make_parser, report
from serving import HERE, Case, drive
from serving_alone import write_images
from serving_peers import OURS, free_port, started
from serving_rounds import Rounds

CASES = (
    Case(name="slow", largest=8, connections=64, fake="100,50"),
    Case(name="batching", largest=8, connections=64, fake="20,10"),
    Case(name="fast", largest=32, connections=256, fake="20,2"),
)
SERVERS = {"plain process": 0, "one replica": 1, "two replicas": 2}
STARTS = 3


def command(case: Case, replicas: int, port: int) -> list[str]:
    """Build the command that starts the server: a plain process, or *replicas* Ray replicas."""
    program = "scale_out_ray.py" if replicas else "serving_ours.py"
    words = [sys.executable, str(HERE / program), "--port", str(port), "--fake", str(case.fake)]
    return [*words, "--largest", str(case.largest), *(["--replicas", str(replicas)] if replicas else [])]


def measure(row: Rounds, case: Case, replicas: int, folder: Path, seconds: float) -> float:
    """Put load on one server, record the result in *row*, and return its images per second."""
    for attempt in range(STARTS):  # Ray's own processes may time out on a busy machine
        port = free_port()
        try:
            with started(command(case, replicas, port), OURS, port, {}, HERE) as process:
                driven = drive(OURS, port, process, case, folder, seconds)
            break
        except (SystemExit, subprocess.CalledProcessError):
            if attempt == STARTS - 1:
                raise
            time.sleep(5)
    row.note(driven.load, driven.cpu_ms)
    return driven.load.images_per_s


def benchmark(cases: tuple[Case, ...], rounds: int, seconds: float) -> list[Rounds]:
    """Measure all servers in all cases; return one row each."""
    rows = {(case.name, server): Rounds(server, case.name) for case in cases for server in SERVERS}
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        for _ in range(rounds):
            for case in cases:
                plain = 0.0  # images per second of the first server, the plain process
                for server, replicas in SERVERS.items():
                    row = rows[case.name, server]
                    rate = measure(row, case, replicas, folder, seconds)
                    plain = plain or rate
                    row.ratios.append(rate / plain)
    return list(rows.values())


def show(rows: list[Rounds]) -> None:
    """Print a table of the medians."""
    print("| case | server | ratio to plain | rounds | images/s | p99 ms | CPU ms per image | not 200 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratios = " ".join(f"{value:.2f}" for value in row.ratios)
        shown = " | ".join(f"{value:.1f}" for value in row.medians())
        ratio = statistics.median(row.ratios)
        print(f"| {row.case} | {row.server} | **{ratio:.2f}** | {ratios} | {shown} | {row.refused} |")


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names of cases, comma-separated")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [case.name for case in CASES]
    cases = tuple(case for case in CASES if case.name in names)
    rows = benchmark(cases, 1 if arguments.quick else arguments.rounds, 5.0 if arguments.quick else 10.0)
    if arguments.json:
        report([result for row in rows for result in row.results("plain process")], as_json=True)
    else:
        show(rows)


if __name__ == "__main__":
    main()
