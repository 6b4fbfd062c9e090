"""What the benchmarks share: interleaved timing, facts about the machine, one shape of result.

Both sides of a comparison are timed in turn within one run, so that a busy machine slows both; the
figure of a side is its median. `ratio` is always ours / other: below 1, ours takes less.

    arguments = parse(__doc__)
    report([compare("pooling", "textbook loop", ours, other, runs=9)], as_json=arguments.json)
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sopdeploy.environment import installed, processor

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
    """One comparison: what ours and the other side took, in *unit*, as medians of *runs*."""

    case: str
    against: str
    ours: float
    other: float
    unit: str
    runs: int

    @property
    def ratio(self) -> float:
        """Return ours / other."""
        return self.ours / self.other


def parse(description: str | None) -> argparse.Namespace:
    """Return the arguments that every benchmark takes: `quick` and `json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs, within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def interleaved(
    sides: Sequence[Callable[[], object]], *, runs: int, warmups: int = 1, clock: Clock = time.perf_counter
) -> tuple[list[float], ...]:
    """Return the seconds of *runs* calls of each side, called in turn, after *warmups* untimed calls."""
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
    """Time *ours* and *other* in turn; return their medians in milliseconds.

    A call must end only when its work has ended: synchronise a device inside it. Work of one thread is
    best timed by `time.process_time`, the processor time of this process, which neighbours on a busy
    machine disturb least.
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
    """Return what a figure depends on: processor, usable cores, memory, system."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a figure may depend on."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def report(results: Sequence[Result], *, as_json: bool, **facts: object) -> None:
    """Print *results*: one JSON document, or a table; *facts* join what is said of the machine."""
    if as_json:
        rows = [{**asdict(result), "ratio": result.ratio} for result in results]
        print(json.dumps({"machine": machine() | facts, "versions": versions(), "results": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in (machine() | facts | versions()).items()))
    for result in results:
        print(
            f"{result.case:48} {result.ours:10.2f} {result.unit:6} against {result.against:24}"
            f"{result.other:10.2f} {result.unit:6} ratio {result.ratio:6.3f} (1 : {1 / result.ratio:.2f})"
        )
