"""Measures the latency of the live model with and without a shadow; both engines are simulated.

    python benchmarks/shadow.py --json

Two servers get the same load alternately: one has a shadow that gets 5 % of the requests, the other has none.
The load is a Poisson stream at about 60 % of the capacity, or 32 clients that saturate the server. `compared`
and `dropped` count images of the shadow over all rounds.
"""

import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import httpx
from load import Load, put_load
from measure import Result, make_parser, report
from serving_alone import write_images
from serving_peers import OURS, free_port, started

HERE = Path(__file__).resolve().parent
SHARE = "0.05"
ENGINE = "20,10"  # ms per batch and per image
LARGEST = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A load: its *name* and the options of `load.py`."""

    name: str
    options: tuple[str, ...]


CASES = (
    Case("48 images/s", ("--rate", "48")),
    Case("32 connections", ("--connections", "32")),
)


def measure(case: Case, folder: Path, seconds: float, *, shadow: bool) -> tuple[Load, dict[str, int]]:
    """Put the load of *case* on a new server; return the client's result and the shadow's counts."""
    port = free_port()
    command = [sys.executable, str(HERE / "serving_ours.py"), "--port", str(port), "--fake", ENGINE]
    command += ["--largest", str(LARGEST), *(("--shadow", SHARE) if shadow else ())]
    with started(command, OURS, port, {}, HERE):
        url = f"http://127.0.0.1:{port}/v1/classify"
        load = put_load(url, folder, seconds, *case.options)
        info = httpx.get(f"http://127.0.0.1:{port}/info").json()
    return load, info.get("shadow", {}).get("images", {})


def compare(case: Case, folder: Path, rounds: int, seconds: float) -> list[Result]:
    """Measure both sides of *case* alternately; compare the medians of the rounds."""
    sides: dict[bool, list[Load]] = {True: [], False: []}
    counts: defaultdict[str, int] = defaultdict(int)
    for number in range(rounds):
        for shadow in (True, False) if number % 2 else (False, True):
            load, counted = measure(case, folder, seconds, shadow=shadow)
            sides[shadow].append(load)
            for name, images in counted.items():
                counts[name] += images
            print(f"{case.name}, shadow {shadow}: {load}", file=sys.stderr)
    results = [
        Result(
            case=f"{case.name}: {what}",
            against="no shadow",
            ours=statistics.median(getattr(load, key) for load in sides[True]),
            other=statistics.median(getattr(load, key) for load in sides[False]),
            unit=unit,
            runs=rounds,
        )
        for what, key, unit in (
            ("throughput", "images_per_s", "images/s"),
            ("p50", "p50_ms", "ms"),
            ("p99", "p99_ms", "ms"),
        )
    ]
    for what, value in (
        ("compared", counts["agree"] + counts["differ"]),
        ("dropped", counts["dropped"]),
    ):
        results.append(Result(case=f"{case.name}: {what}", ours=value, unit="images", runs=rounds))
    return results


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary))
        rows = [row for case in CASES for row in compare(case, folder, arguments.rounds, arguments.seconds)]
    report(rows, as_json=arguments.json, share=SHARE, engine=f"simulated, {ENGINE} ms, at most {LARGEST}")


if __name__ == "__main__":
    main()
