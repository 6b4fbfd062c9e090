"""The soak's books: what the server process holds, what was answered, and which bounds that breaks."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from sopdeploy.client import ClassProbability

ALLOWED_5XX = {(503, "deadline_unreachable")}  # an estimate of the queue; the client may come again
CLOSE = 1e-5  # of probabilities: a batch of four may round otherwise than a batch of one
MOST_MB_PER_MINUTE = 1.0
JUDGED_SECONDS = 60.0  # a slope over less time is the allocator's noise
KEPT = 20


@dataclass(frozen=True, slots=True)
class Holding:
    """What a process holds at *moment*: resident bytes, threads, open descriptors."""

    moment: float
    resident: int
    threads: int
    descriptors: int


def holding(pid: int) -> Holding:
    """Return what the process *pid* holds now."""
    folder = Path(f"/proc/{pid}")
    lines = (folder / "status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return Holding(
        moment=time.monotonic(),
        resident=int(status["VmRSS"].split()[0]) * 1024,
        threads=int(status["Threads"]),
        descriptors=len(list((folder / "fd").iterdir())),
    )


def mb_per_minute(held: Sequence[Holding]) -> float:
    """Return the growth of the resident memory: the median slope of all pairs, which no single step moves."""
    slopes = [
        (late.resident - early.resident) / (late.moment - early.moment)
        for early, late in combinations(held, 2)
        if late.moment > early.moment
    ]
    return statistics.median(slopes) * 60 / 1e6 if slopes else 0.0


def deviation(found: Sequence[ClassProbability], expected: Mapping[str, float]) -> float:
    """Return the largest difference of a probability; infinite where other classes are named."""
    if {item.label for item in found} != expected.keys():
        return float("inf")
    return max(abs(item.probability - expected[item.label]) for item in found)


@dataclass(slots=True)
class Tally:
    """What became of every request; *failures* are those that must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    compared: int = 0
    by_digest: Counter[str] = field(default_factory=Counter)  # answers compared, by who gave them
    worst: float = 0.0

    def note(self, kind: str, status: int, code: str = "", wanted: Sequence[int] = (200,)) -> None:
        """Count an answer to a request of *kind*; 429 may always come, a 5xx only where it is allowed."""
        self.outcomes[kind, f"{status} {code}".strip()] += 1
        fine = status in wanted or status == 429 or (status, code) in ALLOWED_5XX
        if not fine:
            self.fail(f"{kind}: {status} {code}, wanted {' or '.join(map(str, wanted))}")

    def compare(self, kind: str, found: Sequence[ClassProbability], expected: Mapping[str, float]) -> None:
        """Compare an answer with the engine's own."""
        off = deviation(found, expected)
        self.compared += 1
        self.worst = max(self.worst, off)
        if not off <= CLOSE:
            self.fail(f"{kind}: off by {off}")

    def fail(self, what: str) -> None:
        """Keep what must not be; the first of them in words."""
        self.failed += 1
        if len(self.failures) < KEPT:
            self.failures.append(what)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """One promise: what was found, what is allowed, and whether it held; None is not judged."""

    name: str
    found: str
    allowed: str
    held: bool | None


def bounds(tally: Tally, held: Sequence[Holding], exit_code: int) -> list[Bound]:
    """Return every bound of a soak; *held* is with no client there: before it and after each round."""
    before, after = held[0], held[-1]
    slope = mb_per_minute(held)
    judged = len(held) > 1 and held[-1].moment - held[0].moment >= JUDGED_SECONDS
    return [
        Bound(
            name="memory", found=f"{slope:+.3f} MB/min", allowed=f"< {MOST_MB_PER_MINUTE:g}",
            held=slope < MOST_MB_PER_MINUTE if judged else None,
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


def document(tally: Tally, held: Sequence[Holding], found: Sequence[Bound]) -> dict[str, Any]:
    """Return everything for `--json`."""
    first = held[0].moment if held else 0.0
    return {
        "bounds": [{"name": b.name, "found": b.found, "allowed": b.allowed, "held": b.held} for b in found],
        "outcomes": {f"{kind}: {what}": count for (kind, what), count in sorted(tally.outcomes.items())},
        "failures": tally.failures,
        "memory": [(round(h.moment - first, 1), h.resident) for h in held],
    }
