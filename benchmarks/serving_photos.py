"""Images per second and CPU time of servers by the size and kind of the photographs they are sent.

    python benchmarks/serving_photos.py [--against CHECKOUT] --peers FOLDER --peers-python PYTHON
        --onnx FILE [--only triton,mosec] [--kind "12 MP"] [--seconds 5] [--rounds 2] [--json]

The accelerator is simulated (1 + 0.05 n ms for n images, at most 8) and uses no CPU: what a server reads and
decodes is the limit. Each server has two decoders. All servers run at the same time; in each round they are
put under load one after the other for each kind of photograph, by 32 connections. A value is the median of
the rounds. CPU time is that of the server's process tree, divided by all images that it answered.

sopdeploy decodes as recipes for photographs do, `scaled`. The other servers decode with Pillow in full, as
their users write it, and do not turn photographs by EXIF; CHECKOUT is another commit of this project, with
its own benchmark. `refused` counts responses other than 200.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from measure import Result, commit, existing, make_parser, markdown, one_line_errors, report
from serving import Case, drive, peer_environment
from serving_alone import KINDS, write_images
from serving_peers import OURS, PEERS, Peer, free_port, peer_command, started
from serving_rounds import Rounds

CASE = Case(name="photographs", largest=8, connections=32, fake="1,0.05")
CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("", "export", "service", "commands", "plugins/papers")
COUNT = 3  # images of each kind


class Running(NamedTuple):
    """A server that runs, with the port and the process of its supervisor."""

    peer: Peer
    port: int
    process: int


@contextmanager
def running_ours(checkout: Path, *options: str) -> Iterator[Running]:
    """Run the server of *checkout* with the simulated accelerator."""
    port, folder = free_port(), checkout / "benchmarks"
    command = [sys.executable, str(folder / "serving_ours.py"), "--port", str(port), *options]
    command += ["--fake", str(CASE.fake), "--largest", str(CASE.largest)]
    path = {"PYTHONPATH": os.pathsep.join(str(checkout / room) for room in ROOMS)}
    with started(command, OURS, port, path, folder) as process:
        yield Running(OURS, port, process)


@contextmanager
def running_peer(name: str, arguments: argparse.Namespace) -> Iterator[Running]:
    """Run the server *name* of `PEERS`."""
    peer, port = PEERS[name], free_port()
    command = peer_command(arguments.peers_python, peer, port)
    environment = peer_environment(CASE, arguments.onnx)
    with started(command, peer, port, environment, arguments.peers) as process:
        yield Running(peer, port, process)


def measure(arguments: argparse.Namespace, work: Path) -> list[Rounds]:
    """Measure all servers with each kind of photograph in each round."""
    kinds = arguments.kind or list(KINDS)
    folders = {kind: write_images(work / str(kinds.index(kind)), COUNT, KINDS[kind]) for kind in kinds}
    rows: dict[tuple[str, str], Rounds] = {}
    with ExitStack() as stack:
        servers = {"sopdeploy": stack.enter_context(running_ours(CHECKOUT, "--decoding", "scaled"))}
        if arguments.against is not None:
            servers[commit(arguments.against)] = stack.enter_context(running_ours(arguments.against))
        for name in arguments.only.split(",") if arguments.peers is not None else ():
            servers[name] = stack.enter_context(running_peer(name, arguments))
        for _ in range(arguments.rounds):
            for kind, folder in folders.items():
                for name, (peer, port, process) in servers.items():
                    driven = drive(peer, port, process, CASE.connections, folder, arguments.seconds)
                    row = rows.setdefault((kind, name), Rounds(name, kind))
                    row.note(driven.load, driven.cpu_ms, driven.cpu_ms)
                    print(kind, name, driven, file=sys.stderr, flush=True)
    return list(rows.values())


def compare(rows: list[Rounds]) -> list[Result]:
    """Return the values of sopdeploy for each kind of photograph, each beside those of the other servers."""
    ours = {row.case: row for row in rows if row.server == "sopdeploy"}
    results = []
    for row in rows:
        own = ours[row.case]
        if row is own and len(rows) > len(ours):
            continue
        values = zip(("images/s", "p99 ms", "cpu-ms"), own.medians(), row.medians(), strict=True)
        for unit, value, other in (*values, ("refused", own.refused, row.refused)):
            result = Result(case=row.case, ours=value, unit=unit, runs=len(own.cpu_ms))
            results.append(result if row is own else replace(result, against=row.server, other=other))
    return results


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=existing, help="folder with the scripts of other servers")
    parser.add_argument("--peers-python", default=sys.executable, help="Python with their packages")
    parser.add_argument("--only", default="triton,mosec", help="names of servers, comma-separated")
    parser.add_argument("--onnx", type=existing, help="ONNX file that their scripts load; it is not run")
    parser.add_argument("--against", type=existing, help="checkout of another commit")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this; can be repeated")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.peers is not None and arguments.onnx is None:
        parser.error("--peers needs --onnx")
    with one_line_errors(), tempfile.TemporaryDirectory() as work:
        rows = measure(arguments, Path(work))
    if arguments.json:
        report(compare(rows), as_json=True)
        return
    head = ("photograph", "server", "images/s", "p99 ms", "CPU ms", "refused")
    cells = (
        (row.case, row.server, *(f"{value:.1f}" for value in row.medians()), row.refused) for row in rows
    )
    print(markdown(head, cells))


if __name__ == "__main__":
    main()
