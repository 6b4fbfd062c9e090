"""Shared by all benchmarks: interleaved timing, facts about the machine, one format of results.

Both sides of a comparison run alternately within one process, so that other load slows both;
the value of a side is its median. `ratio` is ours / other: for times, a value below 1 means
that ours is faster.

    arguments = parse(__doc__)
    report([compare("pooling", "reference loop", ours, other, runs=9)], as_json=arguments.json)
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sopdeploy.base.environment import installed, processor, usable_cores
from sopdeploy.errors import SopdeployError

Clock = Callable[[], float]
PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "sopdeploy",
    "tensorrt",
    "torch",
    "torchvision",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One measured value in *unit*, the median of *runs*, and the value it is compared with.

    `against` names the other side; it is empty, and `other` is None, for a value without
    comparison.
    """

    case: str
    against: str = ""
    ours: float
    other: float | None = None
    unit: str
    runs: int

    @property
    def ratio(self) -> float | None:
        """ours / other, or None without comparison."""
        return self.ours / self.other if self.other else None


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the option that every benchmark has, `--json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def parse(description: str | None) -> argparse.Namespace:
    """Parse the options of a benchmark that has no others: `--quick` and `--json`."""
    parser = make_parser(description)
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and runs, within a minute"
    )
    return parser.parse_args()


def existing(text: str) -> Path:
    """Convert an argument to the path of a file or folder that exists, as `type` of an option."""
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: not found")
    return path


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `SopdeployError`, which the user can correct, as one line, and exit with code 2."""
    try:
        yield
    except SopdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def interleaved(
    sides: Sequence[Callable[[], object]],
    *,
    runs: int,
    warmups: int = 1,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], ...]:
    """Time *runs* calls of each side in seconds, alternately, after *warmups* untimed calls."""
    for _ in range(warmups):
        for side in sides:
            side()
    seconds: tuple[list[float], ...] = tuple([] for _ in sides)
    for _ in range(runs):
        for side, taken in zip(sides, seconds, strict=True):
            start = clock()
            side()
            taken.append(clock() - start)
    return seconds


def compare(
    case: str,
    against: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    runs: int,
    warmups: int = 1,
    clock: Clock = time.perf_counter,
) -> Result:
    """Time *ours* and *other* alternately; return their medians in milliseconds.

    Each call must finish its work: synchronize a device inside the call. Time single-threaded
    work with `time.process_time`, the processor time of this process, which other load affects
    least.
    """
    ours_s, other_s = interleaved((ours, other), runs=runs, warmups=warmups, clock=clock)
    return Result(
        case=case,
        against=against,
        ours=statistics.median(ours_s) * 1e3,
        other=statistics.median(other_s) * 1e3,
        unit="cpu-ms" if clock is time.process_time else "ms",
        runs=runs,
    )


def machine() -> dict[str, Any]:
    """Describe the machine: processor, usable cores, memory, system."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_gib": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
        ),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """List the versions of Python and of the installed packages that affect results."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def commit(checkout: Path = Path(__file__).parent) -> str:
    """Describe the commit of *checkout*; `-dirty` marks uncommitted changes. "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        described = subprocess.run(
            command, cwd=checkout, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def provenance() -> dict[str, Any]:
    """Return what belongs to every measured value: the date (UTC), commit, machine and versions."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"date": date, "commit": commit(), "machine": machine(), "versions": versions()}


def document(results: Sequence[Result], **facts: object) -> dict[str, Any]:
    """Build the JSON document of every benchmark; *facts* are added to the description of the machine."""
    rows = [{**asdict(result), "ratio": result.ratio} for result in results]
    origin = provenance()
    return {**origin, "machine": origin["machine"] | facts, "results": rows}


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as the pages in docs/benchmarks show it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |".replace("  ", " ") for cells in lines)


def report(results: Sequence[Result], *, as_json: bool, **facts: object) -> None:
    """Print *results* as one JSON document or as a table."""
    if as_json:
        print(json.dumps(document(results, **facts), indent=2))
        return
    print(
        ", ".join(f"{key} {value}" for key, value in (machine() | facts | versions()).items())
    )
    for result in results:
        line = f"{result.case:56} {result.ours:10.2f} {result.unit:8}"
        if result.other is not None:
            line += f" against {result.against:24}{result.other:10.2f} {result.unit:8}"
        if result.ratio:
            line += f" ratio {result.ratio:6.3f} (1 : {1 / result.ratio:.2f})"
        print(line)
