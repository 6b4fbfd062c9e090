"""Two devices behind one port: how requests are distributed, and the latency against a single device.

    python benchmarks/two_devices.py --json

`sopdeploy serve --devices cpu,cpu` with simulated runtimes (20 + 2 n ms for n images, at most 8) that use no
CPU time gets requests over keep-alive connections, in consecutive runs without a restart. Alternately, a
server with one device gets half as many connections.

- `smallest share`: share of the requests that the less loaded device got, in the worst run. Limit: a third.
- `p99`: median of the runs, against the single device. Limit: 1.5 times.
"""

import os
import statistics
import tempfile
from pathlib import Path

from load import put_load
from measure import Result, make_parser, report
from serving_alone import write_images
from simulated_server import Server, running

BATCH = "20,2,8"
METRIC = "sopdeploy_requests_total"


def share(server: Server, folder: Path, connections: int, seconds: float) -> tuple[float, float]:
    """Measure one run: the smallest share of the requests that a device got, and the p99 in ms."""
    before = server.samples(METRIC)
    load = put_load(f"{server.url}/v1/classify", folder, seconds, "--connections", connections)
    after = server.samples(METRIC)
    counts = [after[process] - before.get(process, 0.0) for process in after]
    return min(counts) / sum(counts) if len(counts) == 2 else 0.0, load.p99_ms


def measure(connections: int, runs: int, seconds: float, folder: Path) -> list[Result]:
    """Measure *runs* consecutive runs with *connections* keep-alive connections."""
    shares, ours, other = [], [], []
    with (
        running({"devices": "cpu,cpu", "front_ends": 0}, BATCH) as two,
        running({"devices": "cpu", "front_ends": 0}, BATCH) as one,
    ):
        for _ in range(runs):
            smallest, latency = share(two, folder, connections, seconds)
            shares.append(smallest)
            ours.append(latency)
            other.append(share(one, folder, connections // 2, seconds)[1])
    return [
        Result(
            case=f"smallest share of a device, {connections} connections",
            against="limit",
            ours=min(shares),
            other=1 / 3,
            unit="",
            runs=runs,
        ),
        Result(
            case=f"p99, {connections} connections",
            against=f"1 device, {connections // 2} connections",
            ours=statistics.median(ours),
            other=statistics.median(other),
            unit="ms",
            runs=runs,
        ),
    ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name), count=2)
        for connections in (8, 32, 96):
            results += measure(connections, arguments.runs, arguments.seconds, folder)
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
