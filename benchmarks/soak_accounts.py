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
    processes = [read_resources(process) for process in (pid, *children_of(pid))]
    return Resources(
        moment=processes[0].moment,
        resident=sum(process.resident for process in processes),
        threads=sum(process.threads for process in processes),
        descriptors=sum(process.descriptors for process in processes),
        processes=len(processes),
    )


def mb_per_minute(at_rest: Sequence[Resources]) -> float:
    """Compute the growth of the resident memory: the median slope of all pairs, robust to steps."""
    slopes = [
        (late.resident - early.resident) / (late.moment - early.moment)
        for early, late in combinations(at_rest, 2)
        if late.moment > early.moment
    ]
    return statistics.median(slopes) * 60 / 1e6 if slopes else 0.0


def deviation(classes: Sequence[ClassProbability], expected: Mapping[str, float]) -> float:
    """Compute the largest difference of a probability; infinite if the classes differ."""
    if {item.label for item in classes} != expected.keys():
        return float("inf")
    return max(abs(item.probability - expected[item.label]) for item in classes)


@dataclass(slots=True)
class Tally:
    """Results of all requests; `failures` lists unexpected ones."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    compared: int = 0
    by_digest: Counter[str] = field(default_factory=Counter)  # compared responses by bundle
    worst: float = 0.0

    def note(self, kind: str, status: int, code: str = "", expected: Sequence[int] = (200,)) -> None:
        """Count a response; 429 is always allowed, a 5xx only if listed in ALLOWED_5XX."""
        self.outcomes[kind, f"{status} {code}".strip()] += 1
        allowed = status in expected or status == 429 or (status, code) in ALLOWED_5XX
        if not allowed:
            self.fail(f"{kind}: {status} {code}, expected {' or '.join(map(str, expected))}")

    def compare(self, kind: str, classes: Sequence[ClassProbability], expected: Mapping[str, float]) -> None:
        """Compare a response with direct inference."""
        difference = deviation(classes, expected)
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
    measured: str
    allowed: str
    kept: bool | None


def bounds(tally: Tally, at_rest: Sequence[Resources], exit_code: int) -> list[Bound]:
    """Check all limits; *at_rest* was measured without clients, before the test and after each round."""
    before, after = at_rest[0], at_rest[-1]
    slope, steepest = mb_per_minute(at_rest), MAX_MB_PER_MINUTE * after.processes
    judged = len(at_rest) > 1 and after.moment - before.moment >= JUDGED_SECONDS
    return [
        Bound(
            name="memory", measured=f"{slope:+.3f} MB/min", allowed=f"< {steepest:g}",
            kept=slope < steepest if judged else None,
        ),
        Bound(
            name="threads", measured=f"{before.threads} -> {after.threads}", allowed="no more",
            kept=after.threads <= before.threads,
        ),
        Bound(
            name="descriptors", measured=f"{before.descriptors} -> {after.descriptors}", allowed="no more",
            kept=after.descriptors <= before.descriptors,
        ),
        Bound(
            name="predictions", measured=f"{tally.compared} compared, worst {tally.worst:.1e}",
            allowed=f"all within {CLOSE:g}", kept=tally.compared > 0 and tally.worst <= CLOSE,
        ),
        Bound(
            name="bundles", measured=" ".join(f"{key[:8]} {n}" for key, n in sorted(tally.by_digest.items())),
            allowed="more than one", kept=len(tally.by_digest) > 1,
        ),
        Bound(name="answers", measured=f"{tally.failed} wrong", allowed="0", kept=tally.failed == 0),
        Bound(name="exit code", measured=str(exit_code), allowed="0", kept=exit_code == 0),
    ]  # fmt: skip


def results(tally: Tally, at_rest: Sequence[Resources]) -> list[Result]:
    """Build the results: growth of memory, largest deviation, and the number of responses by kind."""
    totals = [
        Result(
            case="memory growth", against="limit", ours=mb_per_minute(at_rest),
            other=MAX_MB_PER_MINUTE * at_rest[-1].processes,
            unit="MB/min", runs=len(at_rest),
        ),
        Result(
            case="largest deviation of a probability", against="limit", ours=tally.worst, other=CLOSE,
            unit="", runs=tally.compared,
        ),
        Result(case="wrong responses", ours=tally.failed, unit="requests", runs=1),
    ]  # fmt: skip
    return totals + [
        Result(case=f"{kind}: {what}", ours=count, unit="requests", runs=1)
        for (kind, what), count in sorted(tally.outcomes.items())
    ]
