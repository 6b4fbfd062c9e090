"""Throughput of sopdeploy compared with the bare runtime and, if available, with other servers.

    python benchmarks/serving.py --quick
    python benchmarks/serving.py --peers FOLDER --peers-python PYTHON --onnx FILE [--bundle BUNDLE]
        [--only litserve,mosec] [--case "gpu, 64"] [--python triton=PYTHON]

`batching`: a simulated accelerator that sleeps 20 + 10 n ms for n images, at most 8, with 32
connections. `fast device`: 20 + 2 n ms, at most 32, 128 connections; decoding is the
bottleneck. `gpu`: 1 + 0.05 n ms, at most 64, 64 and 256 connections, with small images, so that
the server itself is the bottleneck; compare images/s and the CPU time of an image. `real
engine` (with --bundle; --onnx is the same network for the other servers): onnxruntime on one
thread. Every round measures the bare runtime, every server, and the bare runtime again; a value
is the median of the rounds' ratios to the bare runtime of the same round. CPU per image is the
CPU time of the server's process tree minus that of decoding and inference in one thread, which
is measured with the other servers' decoder if --peers is given, otherwise with ours.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from load import Load, put_load
from measure import Result, existing, make_parser, markdown, one_line_errors, report
from serving_alone import (
    PHOTO,
    SMALL,
    Photographs,
    bare_runtime,
    peer_pipeline,
    pipeline,
    write_images,
)
from serving_ours import fake_model, settings_for
from serving_peers import OURS, PEERS, Peer, cpu_seconds, free_port, peer_command, started

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.inference.loader import load_model

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("", "export", "service", "commands", "plugins/papers")
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


class Driven(NamedTuple):
    """Result of a load, and the CPU milliseconds of the server for each of its images."""

    load: Load
    cpu_ms: float


class Running(NamedTuple):
    """A server that runs, with the port and the process of its supervisor."""

    peer: Peer
    port: int
    process: int

    def drive(self, connections: int, folder: Path, seconds: float, *others: object) -> Driven:
        """Put load on the server, with *others* as further options of `load.py`, and measure it."""
        url, form = (
            f"http://127.0.0.1:{self.port}{self.peer.path}",
            ["--form"] if self.peer.form else [],
        )
        before = cpu_seconds(self.process)
        options = ("--connections", connections, "--header", self.peer.header, *form, *others)
        load = put_load(url, folder, seconds, *options)
        spent = cpu_seconds(self.process) - before
        return Driven(load, 1000 * spent / max(load.all_answered, 1))


@contextmanager
def running_ours(case: Case, checkout: Path, *options: str) -> Iterator[Running]:
    """Run the server of *checkout* with the accelerator of *case*, or with the bundle that *options* name."""
    port, folder = free_port(), checkout / "benchmarks"
    fake = ["--fake", case.fake] if case.fake else []
    command = [
        sys.executable,
        str(folder / "serving_ours.py"),
        "--port",
        str(port),
        *fake,
        *options,
    ]
    command += ["--largest", str(case.largest)]
    path = {"PYTHONPATH": os.pathsep.join(str(checkout / room) for room in ROOMS)}
    with started(command, OURS, port, path, folder) as process:
        yield Running(OURS, port, process)


@contextmanager
def running_peer(
    case: Case,
    name: str,
    python: str,
    arguments: argparse.Namespace,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run the server *name* of `PEERS`, with further environment *variables*."""
    peer, port = PEERS[name], free_port()
    environment = {**peer_environment(case, arguments.onnx), **(variables or {})}
    command = peer_command(python, peer, port)
    with started(command, peer, port, environment, arguments.peers) as process:
        yield Running(peer, port, process)


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


@dataclass(slots=True)
class Rounds:
    """Measurements of one server in one case, one value per round.

    `ratios` compare with the reference of the same round; `refused` counts responses other than
    200. Each benchmark documents what `cpu_ms` includes; `all_cpu_ms` is all CPU time of the
    server per image.
    """

    server: str
    case: str
    ratios: list[float] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    all_cpu_ms: list[float] = field(default_factory=list)
    refused: int = 0

    def note(self, driven: Driven, alone_ms: float = 0.0) -> None:
        """Add the measurements of one round; `cpu_ms` is without *alone_ms*."""
        self.images_per_s.append(driven.load.images_per_s)
        self.p50_ms.append(driven.load.p50_ms)
        self.p99_ms.append(driven.load.p99_ms)
        self.cpu_ms.append(driven.cpu_ms - alone_ms)
        self.all_cpu_ms.append(driven.cpu_ms)
        self.refused += driven.load.refused

    def medians(self) -> tuple[float, float, float]:
        """Medians of images per second, p99 and CPU milliseconds per image."""
        middle = statistics.median
        return middle(self.images_per_s), middle(self.p99_ms), middle(self.cpu_ms)

    def results(self, against: str) -> list[Result]:
        """Return throughput, p99 and CPU time; the ratio to *against* is the median of the rounds."""
        rate, p99, cpu = self.medians()
        runs, case = len(self.ratios), f"{self.case}, {self.server}"
        reference, every = (
            rate / statistics.median(self.ratios),
            statistics.median(self.all_cpu_ms),
        )
        name = f"{case}: throughput"
        return [
            Result(
                case=name,
                against=against,
                ours=rate,
                other=reference,
                unit="images/s",
                runs=runs,
            ),
            Result(case=f"{case}: p99", ours=p99, unit="ms", runs=runs),
            Result(case=f"{case}: CPU per image", ours=cpu, unit="cpu-ms", runs=runs),
            Result(case=f"{case}: all CPU per image", ours=every, unit="cpu-ms", runs=runs),
        ]


def measure(
    case: Case, arguments: argparse.Namespace, folder: Path, rows: dict[tuple[str, str], Rounds]
) -> None:
    """Measure one round of *case* with the images in *folder*; add it to *rows*, by server and case."""
    seconds = 4.0 if arguments.quick else 10.0
    pythons = dict(text.split("=", 1) for text in arguments.python or ())
    names = (
        (arguments.only.split(",") if arguments.only else list(PEERS))
        if arguments.peers
        else []
    )
    if case.fake is None:
        model, options = (
            load_model(arguments.bundle, settings_for(case.largest)),
            ["--bundle", str(arguments.bundle)],
        )
    else:
        fixed, each = map(float, case.fake.split(","))
        model, options = fake_model(fixed, each, case.largest), []
    before = bare_runtime(model.runtime, case.largest, seconds / 2)
    driven: dict[str, Driven] = {}
    for name in names:
        with running_peer(
            case, name, pythons.get(name, arguments.peers_python), arguments
        ) as server:
            driven[name] = server.drive(case.connections, folder, seconds)
    with running_ours(case, CHECKOUT, *options) as server:
        driven["sopdeploy"] = server.drive(case.connections, folder, seconds)
    after = bare_runtime(model.runtime, case.largest, seconds / 2)
    if names:
        environment: Mapping[str, str] = {
            **os.environ,
            **peer_environment(case, arguments.onnx),
        }
        alone = peer_pipeline(
            arguments.peers_python,
            arguments.peers,
            environment,
            folder,
            case.largest,
            seconds / 2,
        )
    else:
        rules = model.bundle.manifest.preprocess
        alone = pipeline(model.runtime, rules, folder, case.largest, seconds / 2)
    for name, of_server in driven.items():
        row = rows.setdefault((name, case.name), Rounds(name, case.name))
        row.ratios.append(
            of_server.load.images_per_s
            / statistics.mean((before.images_per_s, after.images_per_s))
        )
        row.note(of_server, alone.cpu_ms)


def show(rows: list[Rounds]) -> None:
    """Print a table of the medians."""
    cpu = ("CPU ms besides decoding and runtime", "CPU ms")
    cells = []
    for row in rows:
        ratios = " ".join(f"{value:.3f}" for value in row.ratios)
        ratio = f"**{statistics.median(row.ratios):.3f}**"
        medians = [
            f"{value:.2f}" for value in (*row.medians(), statistics.median(row.all_cpu_ms))
        ]
        cells.append((row.case, row.server, ratio, ratios, *medians))
    print(markdown(("case", "server", "ratio", "rounds", "images/s", "p99 ms", *cpu), cells))


def peers_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Create a parser with the options of other servers."""
    parser = make_parser(description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--peers", type=existing, help="folder with the scripts of other servers"
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with their packages"
    )
    parser.add_argument("--only", help="names of servers, comma-separated")
    parser.add_argument("--onnx", type=existing, help="ONNX file that the other servers load")
    return parser


def parse_peers(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line."""
    arguments = parser.parse_args()
    if arguments.peers is not None and arguments.onnx is None:
        parser.error("--peers needs --onnx, the file that those servers load")
    return arguments


def main() -> None:
    """Run from the command line."""
    parser = peers_parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--python", action="append", help="NAME=PYTHON of a server with another environment"
    )
    parser.add_argument("--case", action="append", help="run only this case; can be repeated")
    parser.add_argument(
        "--bundle",
        type=existing,
        help="bundle with 224-pixel input for the real engine: the network of --onnx",
    )
    arguments = parse_peers(parser)
    known = [*CASES, *([REAL] if arguments.bundle else [])]
    cases = [case for case in known if case.name in (arguments.case or [case.name])]
    found: dict[tuple[str, str], Rounds] = {}
    with one_line_errors(), tempfile.TemporaryDirectory() as work:
        if arguments.bundle is not None:
            open_bundle(arguments.bundle)
        folders = {
            size: write_images(Path(work, f"{size[0]}"), kind=Photographs(size))
            for size in (PHOTO, SMALL)
        }
        for _ in range(1 if arguments.quick else arguments.rounds):
            for case in cases:
                measure(case, arguments, folders[case.size], found)
    rows = list(found.values())
    if arguments.json:
        report([result for row in rows for result in row.results("bare runtime")], as_json=True)
    else:
        show(rows)


if __name__ == "__main__":
    main()
