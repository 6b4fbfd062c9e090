"""Our server beside the bare engine and, where their scripts and packages are at hand, beside other servers.

    python benchmarks/serving.py --quick
    python benchmarks/serving.py --peers FOLDER --peers-python PYTHON --onnx FILE [--only litserve,mosec]
    python benchmarks/serving.py --bundle BUNDLE --peers FOLDER --peers-python PYTHON --onnx FILE

Three cases. `batching`: a pretend accelerator that sleeps 20 + 10 n ms for n images, at most 8, under 32
connections. `fast device`: 20 + 2 n, at most 32, 128 connections: here the decoders' CPU is the limit.
`real engine` (with --bundle; --onnx is what the others load, the same network): onnxruntime on one thread.
Every round measures the bare engine, every server, and the bare engine again; a figure is the median of the
rounds' ratios to the bare engine of its round. CPU per image is that of the server's process tree, less
decoding and engine alone.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from load import Load
from measure import machine
from PIL import Image
from serving_ours import pretend, settings_for
from serving_peers import OURS, PEERS, Peer, cpu_seconds, peer_command, started
from serving_row import Row

from sopdeploy_service.decode import Sent, decode
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.verified import open_verified

HERE = Path(__file__).resolve().parent
DELAY_MS = 5  # the others' waiting for a batch; ours needs none


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One engine and one load."""

    name: str
    largest: int
    connections: int
    fake: str | None = None  # milliseconds of a batch and of an image


CASES = (
    Case(name="batching", largest=8, connections=32, fake="20,10"),
    Case(name="fast device", largest=32, connections=128, fake="20,2"),
)
REAL = Case(name="real engine", largest=8, connections=32)


def pictures(folder: Path, count: int = 32) -> Path:
    """Write *count* JPEGs of 500 x 375 pixels, about 50 kB each, into *folder*."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03d}.jpg", quality=88)
    return folder


def bare(runtime: Runtime, largest: int, seconds: float) -> tuple[float, float]:
    """Return images per second of *runtime* in full batches and nothing else, and its CPU ms per image."""
    images = np.zeros((largest, 224, 224, 3), dtype=np.uint8)
    runtime.run(images)
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        runtime.run(images)
        done += largest
    return done / (time.perf_counter() - begun), 1000 * (time.process_time() - cpu) / done


def decode_ms(folder: Path) -> float:
    """Return the CPU milliseconds of decoding one picture of *folder*, as our server does."""
    bodies = [path.read_bytes() for path in sorted(folder.iterdir())]
    rules = pretend(0, 0, 1).bundle.manifest.preprocess
    begun = time.process_time()
    for body in bodies:
        decode(Sent(body), rules, max_bytes=10**8, max_pixels=10**8)
    return 1000 * (time.process_time() - begun) / len(bodies)


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def drive(
    peer: Peer, port: int, process: int, case: Case, folder: Path, seconds: float
) -> tuple[Load, float]:
    """Load a server and return what was measured, and its CPU milliseconds per image."""
    url = f"http://127.0.0.1:{port}{peer.path}"
    command = [
        sys.executable,
        str(HERE / "load.py"),
        url,
        str(folder),
        "--connections",
        str(case.connections),
    ]
    command += ["--seconds", str(seconds)] + (["--form"] if peer.form else [])
    before = cpu_seconds(process)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spent = cpu_seconds(process) - before
    load = Load(**json.loads(done.stdout))
    whole = load.images_per_s * (seconds + 1.0)  # the warm-up is a second
    return load, 1000 * spent / max(whole, 1.0)


class Benchmark:
    """The servers, measured in turn."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._given = given
        self._folder = folder
        self._seconds = 4.0 if given.quick else 10.0
        self._rows: dict[tuple[str, str], Row] = {}

    def run(self) -> list[Row]:
        """Measure every case in every round."""
        known = [*CASES, *([REAL] if self._given.bundle else [])]
        cases = [case for case in known if case.name in (self._given.case or [case.name])]
        for _ in range(1 if self._given.quick else self._given.rounds):
            for case in cases:
                self._round(case)
        return list(self._rows.values())

    def _round(self, case: Case) -> None:
        runtime = self._runtime(case)
        before = bare(runtime, case.largest, self._seconds / 2)
        measured = {name: self._measure(peer, case) for name, peer in self._servers().items()}
        after = bare(runtime, case.largest, self._seconds / 2)
        speed, engine_ms = (statistics.mean(pair) for pair in zip(before, after, strict=True))
        alone = decode_ms(self._folder) + (0.0 if case.fake else engine_ms)
        for name, (load, cpu_ms) in measured.items():
            row = self._rows.setdefault((name, case.name), Row(name, case.name))
            row.ratios.append(load.images_per_s / speed)
            row.note(load, cpu_ms - alone)

    def _runtime(self, case: Case) -> Runtime:
        if case.fake is None:
            settings = settings_for(case.largest, decoders=2, threads=1)
            return open_verified(self._given.bundle, settings).runtime
        fixed, each = map(float, case.fake.split(","))
        return pretend(fixed, each, case.largest).runtime

    def _servers(self) -> dict[str, Peer]:
        if self._given.peers is None:
            return {"sopdeploy": OURS}
        names = self._given.only.split(",") if self._given.only else list(PEERS)
        return {"sopdeploy": OURS, **{name: PEERS[name] for name in names}}

    def _measure(self, peer: Peer, case: Case) -> tuple[Load, float]:
        port = free_port()
        if peer is OURS:
            engine = ["--pretend", case.fake] if case.fake else ["--bundle", str(self._given.bundle)]
            command = [sys.executable, str(HERE / "serving_ours.py"), "--port", str(port), *engine]
            command += ["--largest", str(case.largest)]
            place, environment = HERE, {}
        else:
            command = peer_command(self._given.peers_python, peer, port)
            place, environment = self._given.peers, peer_environment(case, self._given.onnx)
        with started(command, peer, port, environment, place) as process:
            return drive(peer, port, process, case, self._folder, self._seconds)


def peer_environment(case: Case, onnx: Path | None) -> dict[str, str]:
    """Return what tells a peer's script its engine and its batches."""
    environment = {
        "PEER_MAX_BATCH": str(case.largest),
        "PEER_DELAY_MS": str(DELAY_MS),
        "PEER_THREADS": "1",
        "PEER_DECODERS": "2",
        "PEER_ONNX": str(onnx),
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**environment, "PEER_FAKE": case.fake} if case.fake else environment


def show(rows: list[Row]) -> None:
    """Print a table of the medians."""
    print(
        "| case | server | ratio to bare engine | rounds | images/s | p99 ms | CPU ms over decode + engine |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = statistics.median(row.ratios)
        each = " ".join(f"{value:.3f}" for value in row.ratios)
        print(
            f"| {row.case} | {row.server} | **{ratio:.3f}** | {each} | "
            + " | ".join(f"{x:.2f}" for x in row.medians())
            + " |"
        )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="a folder with the other servers' scripts")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has their packages")
    parser.add_argument("--only", help="which of them, comma separated")
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--bundle", type=Path, help="a bundle of 224 pixels, for the real engine: the network of --onnx"
    )
    parser.add_argument("--onnx", type=Path, help="the others' ONNX file for the real engine")
    given = parser.parse_args()
    if given.peers is not None and given.onnx is None:
        parser.error("--peers needs --onnx, the file that those servers load")
    with tempfile.TemporaryDirectory() as folder:
        rows = Benchmark(given, pictures(Path(folder))).run()
    if given.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
