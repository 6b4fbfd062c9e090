"""Images per second and CPU time of servers by the size and kind of the photographs they are sent.

    python benchmarks/serving_photos.py [--against CHECKOUT] --peers FOLDER --peers-python PYTHON
        --onnx FILE [--only triton,mosec] [--kind "12 MP"] [--seconds 5] [--rounds 2] [--json]

The accelerator is simulated (1 + 0.05 n ms for n images, at most 8) and uses no CPU: what a
server reads and decodes is the limit. Each server has two decoders. All servers run at the same
time; in each round they are put under load one after the other for each kind of photograph, by
32 connections. A value is the median of the rounds. CPU time is that of the server's process
tree, divided by all images that it answered.

sopdeploy decodes as recipes for photographs do, `fast`. The other servers decode with Pillow
in full, as their users write it, and do not turn photographs by EXIF; CHECKOUT is another
commit of this project, with its own benchmark. `refused` counts responses other than 200.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from measure import Result, commit, existing, markdown, one_line_errors, report
from serving import (
    CHECKOUT,
    Case,
    Rounds,
    parse_peers,
    peers_parser,
    running_ours,
    running_peer,
)
from serving_alone import KINDS, write_images

CASE = Case(name="photographs", largest=8, connections=32, fake="1,0.05")
COUNT = 3  # images of each kind


def measure(arguments: argparse.Namespace, work: Path) -> list[Rounds]:
    """Measure all servers with each kind of photograph in each round."""
    kinds = arguments.kind or list(KINDS)
    folders = {
        kind: write_images(work / str(kinds.index(kind)), COUNT, KINDS[kind]) for kind in kinds
    }
    rows: dict[tuple[str, str], Rounds] = {}
    with ExitStack() as stack:
        ours = running_ours(CASE, CHECKOUT, "--decoding", "fast")
        servers = {"sopdeploy": stack.enter_context(ours)}
        if arguments.against is not None:
            servers[commit(arguments.against)] = stack.enter_context(
                running_ours(CASE, arguments.against)
            )
        for name in arguments.only.split(",") if arguments.peers is not None else ():
            peer = running_peer(CASE, name, arguments.peers_python, arguments)
            servers[name] = stack.enter_context(peer)
        for _ in range(arguments.rounds):
            for kind, folder in folders.items():
                for name, server in servers.items():
                    driven = server.drive(CASE.connections, folder, arguments.seconds)
                    rows.setdefault((kind, name), Rounds(name, kind)).note(driven)
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
        values = zip(
            ("images/s", "p99 ms", "cpu-ms"), own.medians(), row.medians(), strict=True
        )
        for unit, value, other in (*values, ("refused", own.refused, row.refused)):
            result = Result(case=row.case, ours=value, unit=unit, runs=len(own.cpu_ms))
            results.append(
                result if row is own else replace(result, against=row.server, other=other)
            )
    return results


def main() -> None:
    """Run from the command line."""
    parser = peers_parser(__doc__, rounds=2)
    parser.set_defaults(only="triton,mosec")
    parser.add_argument("--against", type=existing, help="checkout of another commit")
    parser.add_argument(
        "--kind", action="append", choices=list(KINDS), help="only this; can be repeated"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parse_peers(parser)
    with one_line_errors(), tempfile.TemporaryDirectory() as work:
        rows = measure(arguments, Path(work))
    if arguments.json:
        report(compare(rows), as_json=True)
        return
    head = ("photograph", "server", "images/s", "p99 ms", "CPU ms", "refused")
    cells = (
        (row.case, row.server, *(f"{value:.1f}" for value in row.medians()), row.refused)
        for row in rows
    )
    print(markdown(head, cells))


if __name__ == "__main__":
    main()
