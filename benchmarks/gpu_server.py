"""`sopdeploy serve` on a GPU with 0 to 8 front ends and with the automatic number, in a quarter of an hour.

    python benchmarks/gpu_server.py BUNDLE ... --out FILE [--seconds 5] [--front-ends 0,2,4,8,auto]
        [--photographs "500 x 375,12 MP"] [--connections 64,256]

For each bundle and number: seconds until the server is ready, the answers to 500 small
photographs at once, and for each kind of photograph and number of connections images/s, p50 and
p99, the share of the time in which the GPU works and its memory (nvidia-smi), CPU ms per image.
The load comes from four client processes. First, for each kind: the images/s that all cores
decode when they do nothing else. Every result is written at once, as a JSON line; combinations
that the file has are not measured again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from load import put_loads, serving
from serving_alone import KINDS, decode_image, read_files, repeat, write_images
from serving_peers import cpu_seconds

from sopdeploy.images.preprocess import Preprocess

BURST = 500
QUEUE = 1024
IMAGES, OTHERS = 32, 8  # files of the first kind of photograph, and of each other one
Result = dict[str, Any]


@dataclass(slots=True)
class GpuWatch:
    """Samples of the busy share and the memory of the GPU, until `stop`."""

    busy: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample twice per second; nothing without nvidia-smi."""
        query = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu,memory.used",
            "--format=csv,noheader,nounits",
        ]
        while not self._ended.wait(0.5):
            try:
                text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return
            busy, used = text.splitlines()[0].split(",")
            self.busy.append(float(busy))
            self.mebibytes.append(float(used))

    def stop(self) -> dict[str, float | None]:
        """Return the mean busy share in percent and the largest memory in MiB."""
        self._ended.set()
        mean = statistics.mean(self.busy) if self.busy else None
        return {"gpu_busy_percent": mean, "gpu_mib": max(self.mebibytes, default=None)}


def send_burst(url: str, folder: Path) -> Result:
    """Send `BURST` images at once to an idle server; return the seconds and the number of each status."""
    bodies = [path.read_bytes() for path in sorted(folder.iterdir())]
    limits = httpx.Limits(max_connections=BURST)
    with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(BURST) as pool:
        started = time.perf_counter()
        sent = [
            pool.submit(client.post, url, content=bodies[n % len(bodies)]) for n in range(BURST)
        ]
        codes = Counter(str(one.result().status_code) for one in sent)
        return {"burst_s": time.perf_counter() - started, "burst_codes": dict(codes)}


def decoded_per_second(folder: Path, seconds: float) -> float:
    """Decode the photographs of *folder* on one core, as the server does for networks that `train` makes."""
    bodies, rules = read_files(folder), Preprocess(decoding="fast")
    return repeat(
        lambda done: decode_image(bodies[done % len(bodies)], rules), 1, seconds
    ).images_per_s


def measure_decoding(kind: str, folder: Path, seconds: float) -> Result:
    """Decode photographs of a *kind* on all cores at once."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        speeds = pool.map(decoded_per_second, [folder] * cores, [seconds] * cores)
        return {"decoding": kind, "cores": cores, "images_per_s": sum(speeds)}


def measure(
    bundle: str, front_ends: str, folders: dict[str, Path], arguments: argparse.Namespace
) -> Iterator[Result]:
    """Measure a server for *bundle* with so many *front_ends*."""
    started = time.perf_counter()
    options = ("--set", f"front_ends={front_ends}", "--set", f"queue_size={QUEUE}")
    with serving(bundle, *options) as (process, address):
        ready = time.perf_counter() - started
        number = httpx.get(f"{address}/v1/status", timeout=30).json()["front_ends"]
        url = f"{address}/v1/classify"
        fields = {"bundle": bundle, "front_ends": front_ends, "number": number}
        yield {**fields, "ready_s": ready, **send_burst(url, next(iter(folders.values())))}
        for kind, folder in folders.items():
            for connections in map(int, arguments.connections.split(",")):
                watch = GpuWatch()
                threading.Thread(target=watch.watch, daemon=True).start()
                before = cpu_seconds(process.pid)
                load = put_loads(url, folder, arguments.seconds, connections)
                cpu_ms = 1000 * (cpu_seconds(process.pid) - before) / max(load.all_answered, 1)
                values = {
                    "images_per_s": load.images_per_s,
                    "p50_ms": load.p50_ms,
                    "p99_ms": load.p99_ms,
                }
                row = {**fields, "photographs": kind, "connections": connections, **values}
                yield {**row, "refused": load.refused, "cpu_ms": cpu_ms, **watch.stop()}


def write(result: Result, out: Path) -> None:
    """Append *result* to the file *out*, and print it."""
    with out.open("a") as file:
        print(json.dumps(result), file=file)
    print(json.dumps(result), file=sys.stderr, flush=True)


def main() -> int:
    """Run from the command line; return 1 if a server failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--front-ends", default="auto,0,4,2,8")
    parser.add_argument(
        "--photographs", default="500 x 375,12 MP", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument("--connections", default="64,256")
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="no measurement begins after so long"
    )
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    done = {
        (line.get("bundle"), line.get("front_ends", line.get("decoding")))
        for line in map(json.loads, lines)
        if "error" not in line
    }
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folders = {
            kind: write_images(
                Path(name, str(number)), OTHERS if number else IMAGES, KINDS[kind]
            )
            for number, kind in enumerate(arguments.photographs.split(","))
        }
        for kind, folder in folders.items():
            if (None, kind) not in done:
                write(measure_decoding(kind, folder, arguments.seconds / 2), arguments.out)
        for front_ends in arguments.front_ends.split(","):
            for bundle in arguments.bundles:
                if (bundle, front_ends) in done or time.monotonic() > end:
                    continue
                try:
                    for result in measure(bundle, front_ends, folders, arguments):
                        write(result, arguments.out)
                except (OSError, RuntimeError, httpx.HTTPError) as error:
                    row = {"bundle": bundle, "front_ends": front_ends, "error": str(error)}
                    write(row, arguments.out)
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
