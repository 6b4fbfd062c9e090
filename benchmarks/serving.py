"""Throughput of sopdeploy compared with the bare runtime and, if available, with other servers.

    python benchmarks/serving.py --quick
    python benchmarks/serving.py --peers FOLDER --peers-python PYTHON --onnx FILE [--only litserve,mosec]
    python benchmarks/serving.py --bundle BUNDLE --peers FOLDER --peers-python PYTHON --onnx FILE
    python benchmarks/serving.py ... --case "gpu, 64" --only mosec,triton [--python triton=PYTHON]

`batching`: a simulated accelerator that sleeps 20 + 10 n ms for n images, at most 8, with 32 connections.
`fast device`: 20 + 2 n ms, at most 32, 128 connections; decoding is the bottleneck. `gpu`: 1 + 0.05 n ms, at
most 64, 64 and 256 connections, with small images, so that the server itself is the bottleneck; compare
images/s and the CPU time of an image. `real engine` (with --bundle; --onnx is the same network for the other
servers): onnxruntime on one thread. Every
round measures the bare runtime, every server, and the bare runtime again; a value is the median of the
rounds' ratios to the bare runtime of the same round. CPU per image is the CPU time of the server's process
tree minus that of decoding and inference in one thread, which is measured with the other servers' decoder if
--peers is given, otherwise with ours.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from load import Load, put_load
from measure import existing, make_parser, markdown, one_line_errors, report
from serving_alone import PHOTO, SMALL, Photographs, bare_runtime, peer_pipeline, pipeline, write_images
from serving_ours import fake_model, settings_for
from serving_peers import OURS, PEERS, Peer, cpu_seconds, free_port, peer_command, started
from serving_rounds import Rounds

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.inference.loader import LoadedModel, load_model

HERE = Path(__file__).resolve().parent
DELAY_MS = 5  # batching delay of the other servers; sopdeploy needs none


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A runtime and a load."""

    name: str
    largest: int
    connections: int
    fake: str | None = None  # milliseconds of a batch and of an image
    size: tuple[int, int] = PHOTO  # of the images, in pixels


CASES = (
    Case(name="batching", largest=8, connections=32, fake="20,10"),
    Case(name="fast device", largest=32, connections=128, fake="20,2"),
    Case(name="gpu, 64", largest=64, connections=64, fake="1,0.05", size=SMALL),
    Case(name="gpu, 256", largest=64, connections=256, fake="1,0.05", size=SMALL),
)
REAL = Case(name="real engine", largest=8, connections=32)


@dataclass(frozen=True, slots=True)
class Driven:
    """Result of a load, and the CPU seconds of the server for all of its images."""

    load: Load
    cpu_s: float

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per image."""
        return 1000 * self.cpu_s / max(self.load.all_answered, 1)


def drive(peer: Peer, port: int, process: int, connections: int, folder: Path, seconds: float) -> Driven:
    """Put load on a server and measure it."""
    url = f"http://127.0.0.1:{port}{peer.path}"
    form = ["--form"] if peer.form else []
    before = cpu_seconds(process)
    load = put_load(url, folder, seconds, "--connections", connections, "--header", peer.header, *form)
    return Driven(load, cpu_seconds(process) - before)


class Benchmark:
    """Measures all servers alternately."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        kinds = {size: Photographs(size) for size in (PHOTO, SMALL)}
        self._folders = {size: write_images(folder / f"{size[0]}", kind=kind) for size, kind in kinds.items()}
        self._pythons = dict(text.split("=", 1) for text in arguments.python or ())
        self._seconds = 4.0 if arguments.quick else 10.0
        self._rows: dict[tuple[str, str], Rounds] = {}

    def run(self) -> list[Rounds]:
        """Measure every case in every round."""
        known = [*CASES, *([REAL] if self._arguments.bundle else [])]
        cases = [case for case in known if case.name in (self._arguments.case or [case.name])]
        for _ in range(1 if self._arguments.quick else self._arguments.rounds):
            for case in cases:
                self._round(case)
        return list(self._rows.values())

    def _round(self, case: Case) -> None:
        model = self._model(case)
        before = bare_runtime(model.runtime, case.largest, self._seconds / 2)
        measured = {name: self._measure(name, peer, case) for name, peer in self._peers().items()}
        driven = self._measure_ours(case)
        after = bare_runtime(model.runtime, case.largest, self._seconds / 2)
        speed = statistics.mean((before.images_per_s, after.images_per_s))
        alone_ms = self._peer_pipeline_ms(case) if measured else self._pipeline_ms(model, case)
        for name, server in {"sopdeploy": driven, **measured}.items():
            self._add(name, case, server, speed, alone_ms)

    def _add(self, name: str, case: Case, driven: Driven, speed: float, alone_ms: float) -> None:
        row = self._rows.setdefault((name, case.name), Rounds(name, case.name))
        row.ratios.append(driven.load.images_per_s / speed)
        row.note(driven.load, driven.cpu_ms - alone_ms, driven.cpu_ms)

    def _model(self, case: Case) -> LoadedModel:
        if case.fake is None:
            return load_model(self._arguments.bundle, settings_for(case.largest))
        fixed, each = map(float, case.fake.split(","))
        return fake_model(fixed, each, case.largest)

    def _pipeline_ms(self, model: LoadedModel, case: Case) -> float:
        rules = model.bundle.manifest.preprocess
        return pipeline(
            model.runtime, rules, self._folders[case.size], case.largest, self._seconds / 2
        ).cpu_ms

    def _peer_pipeline_ms(self, case: Case) -> float:
        python, environment = self._arguments.peers_python, {**os.environ, **self._environment(case)}
        pipeline_alone = peer_pipeline(
            python,
            self._arguments.peers,
            environment,
            self._folders[case.size],
            case.largest,
            self._seconds / 2,
        )
        return pipeline_alone.cpu_ms

    def _peers(self) -> dict[str, Peer]:
        if self._arguments.peers is None:
            return {}
        names = self._arguments.only.split(",") if self._arguments.only else list(PEERS)
        return {name: PEERS[name] for name in names}

    def _measure(self, name: str, peer: Peer, case: Case) -> Driven:
        port = free_port()
        command = peer_command(self._pythons.get(name, self._arguments.peers_python), peer, port)
        with started(command, peer, port, self._environment(case), self._arguments.peers) as process:
            return drive(peer, port, process, case.connections, self._folders[case.size], self._seconds)

    def _measure_ours(self, case: Case) -> Driven:
        port = free_port()
        runtime = ["--fake", case.fake] if case.fake else ["--bundle", str(self._arguments.bundle)]
        command = [sys.executable, str(HERE / "serving_ours.py"), "--port", str(port), *runtime]
        with started([*command, "--largest", str(case.largest)], OURS, port, {}, HERE) as process:
            return drive(OURS, port, process, case.connections, self._folders[case.size], self._seconds)

    def _environment(self, case: Case) -> dict[str, str]:
        return peer_environment(case, self._arguments.onnx)


def peer_environment(case: Case, onnx: Path | None) -> dict[str, str]:
    """Environment variables that configure the script of another server."""
    environment = {
        "PEER_MAX_BATCH": str(case.largest),
        "PEER_DELAY_MS": str(DELAY_MS),
        "PEER_THREADS": "1",
        "PEER_DECODERS": "2",
        "OMP_NUM_THREADS": "1",
        "PEER_ONNX": str(onnx),
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**environment, "PEER_FAKE": case.fake} if case.fake else environment


def show(rows: list[Rounds]) -> None:
    """Print a table of the medians."""
    head = (
        "case",
        "server",
        "ratio",
        "rounds",
        "images/s",
        "p99 ms",
        "CPU ms besides decoding and runtime",
        "CPU ms",
    )
    cells = []
    for row in rows:
        ratios = " ".join(f"{value:.3f}" for value in row.ratios)
        ratio, *medians = (
            f"**{statistics.median(row.ratios):.3f}**",
            *(f"{value:.2f}" for value in (*row.medians(), statistics.median(row.all_cpu_ms))),
        )
        cells.append((row.case, row.server, ratio, ratios, *medians))
    print(markdown(head, cells))


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=existing, help="folder with the scripts of other servers")
    parser.add_argument("--peers-python", default=sys.executable, help="Python with their packages")
    parser.add_argument("--python", action="append", help="NAME=PYTHON of a server with another environment")
    parser.add_argument("--only", help="names of servers, comma-separated")
    parser.add_argument("--case", action="append", help="run only this case; can be repeated")
    parser.add_argument(
        "--bundle",
        type=existing,
        help="bundle with 224-pixel input for the real engine: the network of --onnx",
    )
    parser.add_argument("--onnx", type=existing, help="ONNX file of the other servers for the real engine")
    arguments = parser.parse_args()
    if arguments.peers is not None and arguments.onnx is None:
        parser.error("--peers needs --onnx, the file that those servers load")
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        if arguments.bundle is not None:
            open_bundle(arguments.bundle)
        rows = Benchmark(arguments, Path(folder)).run()
    if arguments.json:
        report([result for row in rows for result in row.results("bare runtime")], as_json=True)
    else:
        show(rows)


if __name__ == "__main__":
    main()
