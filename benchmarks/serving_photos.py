"""Images per second and CPU time of servers by the size and kind of the photographs they are sent.

    python benchmarks/serving_photos.py [--against CHECKOUT] --peers FOLDER --peers-python PYTHON
        --onnx FILE [--only triton,mosec] [--kind "12 MP"] [--seconds 5] [--rounds 2] [--json]

The accelerator is simulated (1 + 0.05 n ms for n images, at most 8) and uses no CPU: what a
server reads and decodes is the limit. Each server has two decoders. All servers run at the same
time; in each round they are put under load one after the other for each row, a kind of photograph
or a kind of client. 32 connections send one image after the other; `new connections` opens one
for each image, `single client` is one connection. A value is the median of the rounds. CPU time is
that of the server's process tree, divided by all images that it answered.

sopdeploy decodes as recipes for photographs do, `fast`, in a sandbox; `no sandbox` is the price of
the sandbox. Each other server has two rows: as its users write it (Pillow in full, normalized to
float32 in Python) and, as `same decoding`, with what sopdeploy does: uint8 pixels, the same package
for resizing, and large JPEGs decoded at a fraction of their size. No other server turns photographs by EXIF.
CHECKOUT is another commit of this project, with its own benchmark. `refused` counts responses other than 200.
"""

import argparse
import itertools
import statistics
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
    Running,
    parse_peers,
    peers_parser,
    running_ours,
    running_peer,
)
from serving_alone import KINDS, write_images

CASE = Case(name="photographs", largest=8, connections=32, fake="1,0.05")
COUNT = 3  # images of each kind
# Variables of the scripts of other servers, for the pixels that sopdeploy computes
SAME_DECODING = {"PEER_PIXELS": "uint8", "PEER_RESIZE": "cykooz", "PEER_DRAFT": "1"}
OF_CLIENTS = "500 x 375"  # the kind of photograph that other kinds of clients send
CLIENTS = {  # connections, and options of `load.py`
    "": (CASE.connections, ()),
    "new connections": (CASE.connections, ("--reconnect",)),
    "single client": (1, ()),
}


def start(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, Running]:
    """Start all servers until *stack* is closed."""
    ours = ("--decoding", "fast")
    contexts = {
        "sopdeploy": running_ours(CASE, CHECKOUT, *ours),
        "sopdeploy, no sandbox": running_ours(CASE, CHECKOUT, *ours, "--sandbox", "off"),
    }
    if arguments.against is not None:
        contexts[commit(arguments.against)] = running_ours(CASE, arguments.against, *ours)

    for name in arguments.only.split(",") if arguments.peers is not None else ():
        options = CASE, name, arguments.peers_python, arguments
        contexts[name] = running_peer(*options)
        contexts[f"{name}, same decoding"] = running_peer(*options, SAME_DECODING)
    return {name: stack.enter_context(context) for name, context in contexts.items()}


def measure(arguments: argparse.Namespace, work: Path) -> list[Rounds]:
    """Measure all servers with each kind of photograph, and of client, in each round."""
    rows: dict[tuple[str, str], Rounds] = {}
    kinds = arguments.kind or list(KINDS)
    folders = {
        kind: write_images(work / str(number), COUNT, KINDS[kind])
        for number, kind in enumerate(kinds)
    }

    with ExitStack() as stack:
        servers = start(arguments, stack)
        for _, kind, clients in itertools.product(range(arguments.rounds), kinds, CLIENTS):
            if clients and kind != OF_CLIENTS:
                continue
            case = f"{kind}, {clients}" if clients else kind
            connections, options = CLIENTS[clients]

            for name, server in servers.items():
                driven = server.drive(connections, folders[kind], arguments.seconds, *options)
                rows.setdefault((case, name), Rounds(name, case)).note(driven)
                print(case, name, driven, file=sys.stderr, flush=True)
    return list(rows.values())


def compare(rows: list[Rounds]) -> list[Result]:
    """Return the values of sopdeploy for each kind of photograph, each beside those of the other servers."""
    ours = {row.case: row for row in rows if row.server == "sopdeploy"}
    results = []
    for row in rows:
        own = ours[row.case]
        if row is own and len(rows) > len(ours):
            continue
        units = ("images/s", "p50 ms", "p99 ms", "cpu-ms", "refused")
        for unit, value, other in zip(units, values_of(own), values_of(row), strict=True):
            result = Result(case=row.case, ours=value, unit=unit, runs=len(own.cpu_ms))
            results.append(
                result if row is own else replace(result, against=row.server, other=other)
            )
    return results


def values_of(row: Rounds) -> tuple[float, ...]:
    """Return images/s, p50 and p99 in milliseconds and CPU milliseconds, as medians, and the refused images."""
    rate, p99, cpu_ms = row.medians()
    return rate, statistics.median(row.p50_ms), p99, cpu_ms, row.refused


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
    head = ("photograph", "server", "images/s", "p50 ms", "p99 ms", "CPU ms", "refused")
    cells = (
        (row.case, row.server, *(f"{value:.1f}" for value in values_of(row))) for row in rows
    )
    print(markdown(head, cells))


if __name__ == "__main__":
    main()
