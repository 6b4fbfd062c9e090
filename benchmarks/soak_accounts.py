"""Bookkeeping of the soak test: resources of the server's processes, responses, and limits."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from measure import Result

from sopdeploy.client import ClassProbability

ALLOWED_5XX = {(503, "deadline_unreachable")}  # estimated from the queue; clients may retry
CLOSE = 1e-5  # difference of probabilities: rounding depends on the batch size
MAX_MB_PER_MINUTE = 1.0  # of each process
JUDGED_SECONDS = 60.0  # shorter runs are not judged: the allocator dominates the slope
KEPT = 20


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of processes at *moment*: resident bytes, threads, open descriptors."""

    moment: float
    resident: int
    threads: int
    descriptors: int
    processes: int = 1


def read_resources(pid: int) -> Resources:
    """Read the resources of the process *pid*, without its children."""
    folder = Path(f"/proc/{pid}")
    lines = (folder / "status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return Resources(
        moment=time.monotonic(),
        resident=int(status["VmRSS"].split()[0]) * 1024,
        threads=int(status["Threads"]),
        descriptors=len(list((folder / "fd").iterdir())),
    )


def children_of(pid: int) -> list[int]:
    """List the child processes of the process *pid*."""
    files = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own
    return sorted(int(part) for file in files for part in file.read_text().split())


def read_all_resources(pid: int) -> Resources:
    """Sum the resources of the process *pid* and its children; shared memory counts once for each."""
    found = [read_resources(process) for process in (pid, *children_of(pid))]
    return Resources(
        moment=found[0].moment,
        resident=sum(one.resident for one in found),
        threads=sum(one.threads for one in found),
        descriptors=sum(one.descriptors for one in found),
        processes=len(found),
    )


def mb_per_minute(held: Sequence[Resources]) -> float:
    """Compute the growth of the resident memory: the median slope of all pairs, robust to steps."""
    slopes = [
        (late.resident - early.resident) / (late.moment - early.moment)
        for early, late in combinations(held, 2)
        if late.moment > early.moment
    ]
    return statistics.median(slopes) * 60 / 1e6 if slopes else 0.0


def deviation(found: Sequence[ClassProbability], expected: Mapping[str, float]) -> float:
    """Compute the largest difference of a probability; infinite if the classes differ."""
    if {item.label for item in found} != expected.keys():
        return float("inf")
    return max(abs(item.probability - expected[item.label]) for item in found)


@dataclass(slots=True)
class Tally:
    """Results of all requests; `failures` lists unexpected ones."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    compared: int = 0
    by_digest: Counter[str] = field(default_factory=Counter)  # compared responses by bundle
    worst: float = 0.0

    def note(self, kind: str, status: int, code: str = "", wanted: Sequence[int] = (200,)) -> None:
        """Count a response; 429 is always allowed, a 5xx only if listed in ALLOWED_5XX."""
        self.outcomes[kind, f"{status} {code}".strip()] += 1
        allowed = status in wanted or status == 429 or (status, code) in ALLOWED_5XX
        if not allowed:
            self.fail(f"{kind}: {status} {code}, wanted {' or '.join(map(str, wanted))}")

    def compare(self, kind: str, found: Sequence[ClassProbability], expected: Mapping[str, float]) -> None:
        """Compare a response with direct inference."""
        difference = deviation(found, expected)
        self.compared += 1
        self.worst = max(self.worst, difference)
        if not difference <= CLOSE:
            self.fail(f"{kind}: differs by {difference}")

    def fail(self, what: str) -> None:
        """Count a failure and store the first few messages."""
        self.failed += 1
        if len(self.failures) < KEPT:
            self.failures.append(what)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A limit: measured value, allowed value, and whether it was kept (None: not judged)."""

    name: str
    found: str
    allowed: str
    held: bool | None


def bounds(tally: Tally, held: Sequence[Resources], exit_code: int) -> list[Bound]:
    """Check all limits; *held* was measured without clients, before the test and after each round."""
    before, after = held[0], held[-1]
    slope, steepest = mb_per_minute(held), MAX_MB_PER_MINUTE * after.processes
    judged = len(held) > 1 and held[-1].moment - held[0].moment >= JUDGED_SECONDS
    return [
        Bound(
            name="memory", found=f"{slope:+.3f} MB/min", allowed=f"< {steepest:g}",
            held=slope < steepest if judged else None,
        ),
        Bound(
            name="threads", found=f"{before.threads} -> {after.threads}", allowed="no more",
            held=after.threads <= before.threads,
        ),
        Bound(
            name="descriptors", found=f"{before.descriptors} -> {after.descriptors}", allowed="no more",
            held=after.descriptors <= before.descriptors,
        ),
        Bound(
            name="predictions", found=f"{tally.compared} compared, worst {tally.worst:.1e}",
            allowed=f"all within {CLOSE:g}", held=tally.compared > 0 and tally.worst <= CLOSE,
        ),
        Bound(
            name="bundles", found=" ".join(f"{key[:8]} {n}" for key, n in sorted(tally.by_digest.items())),
            allowed="more than one", held=len(tally.by_digest) > 1,
        ),
        Bound(name="answers", found=f"{tally.failed} wrong", allowed="0", held=tally.failed == 0),
        Bound(name="exit code", found=str(exit_code), allowed="0", held=exit_code == 0),
    ]  # fmt: skip


def results(tally: Tally, held: Sequence[Resources]) -> list[Result]:
    """Build the results: growth of memory, largest deviation, and the number of responses by kind."""
    found = [
        Result(
            case="memory growth", against="limit", ours=mb_per_minute(held),
            other=MAX_MB_PER_MINUTE * held[-1].processes,
            unit="MB/min", runs=len(held),
        ),
        Result(
            case="largest deviation of a probability", against="limit", ours=tally.worst, other=CLOSE,
            unit="", runs=tally.compared,
        ),
        Result(case="wrong responses", ours=tally.failed, unit="requests", runs=1),
    ]  # fmt: skip
    return found + [
        Result(case=f"{kind}: {what}", ours=count, unit="requests", runs=1)
        for (kind, what), count in sorted(tally.outcomes.items())
    ]
