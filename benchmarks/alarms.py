"""How often the server's drift alarm fires on usual traffic, and after how many photographs on changed traffic.

    python benchmarks/alarms.py --data DIR ... --unknown DIR --weights FILE [--cache DIR]
        [--references 6] [--windows 8] [--json]

--data are folders of photographs, <class>/*.jpg, --unknown one of other things. The traffic is that of
`month.py`, with one, two and four photographs of each object. For each reference, a first bundle answers
usual traffic, so that --windows windows are compared, one after each 50 predictions. Then 30 kept
photographs are labelled, and a bundle that is trained on them, too, replaces it; the same number of windows
of usual traffic follows, in which the labelled objects do not come again. Then a quarter of the traffic is
a new class, another one for each reference; or, in another continuation, a lamp is at 60 % too. "4, 6 of 6"
are references with an alarm within 1,000 and within 2,000 changed photographs.

An interval of 95 % is of the shares of references, because windows of one reference resemble each other.
Exit status 1: it is above one alarm in 60 usual windows, or a lamp has no alarm within 1,000.
"""

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from measure import Result, existing, markdown, one_line_errors, report
from month import DIM_DAY, NEW_DAY, Monitor, Month, Traffic, World, blocks_of, keep, sets_parser
from numpy.typing import NDArray
from photo_sets import Bundle, Photographs, read_sets

from sopdeploy.evaluation.drift import BLOCK, WINDOW
from sopdeploy.evaluation.watch import TEST_BLOCKS

Array = NDArray[Any]
FRAMES = (1, 2, 4)
LABELS = 30
STEP = BLOCK * TEST_BLOCKS  # answers between two comparisons
PARTS = {"usual": "usual", "promoted": "after a promotion"}
LAMP = "and a lamp at 60 %"
CHANGES = {"a new class": NEW_DAY, LAMP: DIM_DAY}
GOAL = 1 / 60


class OfReference(NamedTuple):
    """Alarms of a reference: their causes by window, before and after a promotion, and delays by change."""

    usual: list[list[str]]
    promoted: list[list[str]]
    delays: dict[str, int | None]


def compare_usual(world: World, monitor: Monitor, live: Bundle, count: int) -> list[list[str]]:
    """Send usual traffic until *count* windows are compared; return the alarms of each."""
    compared: list[Any] = []
    while len(compared) < count:
        compared += monitor.add(live, blocks_of(world.send(1, STEP)))
    return [
        [name for name, result in one.items() if result.is_alarm] for one in compared[:count]
    ]


def find_delay(world: World, monitor: Monitor, live: Bundle, day: int) -> int | None:
    """Send the traffic of *day* until an alarm; return the number of photographs, None above two windows."""
    for sent in range(STEP, 2 * WINDOW + 1, STEP):
        for one in monitor.add(live, blocks_of(world.send(day, STEP))):
            if any(result.is_alarm for result in one.values()):
                return sent
    return None


def measure_reference(
    photographs: Photographs, foreign: Photographs, frames: int, seed: int, windows: int
) -> OfReference:
    """Send usual traffic, promote a bundle, send usual traffic again, then changed traffic."""
    traffic = Traffic(frames=frames)
    world = World(photographs, foreign, seed % len(photographs.labels), seed, traffic)
    month = Month(world, seed)
    month.chosen = world.first.tolist()
    month.labels = photographs.classes[world.first].tolist()
    live = month.train(is_first=True)
    monitor = Monitor()
    usual = compare_usual(world, monitor, live, windows)

    # Label some of what was kept of a day, and promote.
    keep(month, 1, world.send(1, WINDOW), live)
    month.label_kept(LABELS)
    live = month.train()
    monitor.replace(month.chosen)
    world.pool = np.setdiff1d(world.pool, month.chosen)
    promoted = compare_usual(world, monitor, live, windows)

    # Each change begins with the same traffic before it.
    delays = dict[str, int | None]()
    for name, day in CHANGES.items():
        changed = copy.copy(world)
        changed.random = copy.deepcopy(world.random)
        continued = copy.deepcopy(monitor)
        delays[name] = find_delay(changed, continued, live, day)
    return OfReference(usual, promoted, delays)


def count_alarms(measured: Sequence[OfReference], part: str) -> Array:
    """Return the share of windows with an alarm of each reference (R,), in the *part* of its traffic."""
    return np.asarray(
        [np.mean([bool(names) for names in getattr(reference, part)]) for reference in measured]
    )


def estimate_rate(shares: Array) -> tuple[float, float, float]:
    """Return the mean of *shares* (R,) and its interval of 95 %, from references drawn again."""
    random = np.random.default_rng(0)
    means = random.choice(shares, (10_000, len(shares))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(shares.mean()), float(low), float(high)


def describe(measured: Sequence[OfReference], name: str, frames: object) -> list[object]:
    """Return a row of the table."""
    row: list[object] = [name, frames]
    for part in PARTS:
        mean, low, high = (100 * rate for rate in estimate_rate(count_alarms(measured, part)))
        row.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
    for change in CHANGES:
        delays = [reference.delays[change] or math.inf for reference in measured]
        counts = [sum(delay <= limit for delay in delays) for limit in (WINDOW, 2 * WINDOW)]
        row.append(f"{counts[0]}, {counts[1]} of {len(delays)}")
    return row


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = sets_parser(__doc__)
    parser.add_argument("--data", type=existing, nargs="+", required=True)
    parser.add_argument("--references", type=int, default=6, help="of each set and FRAMES")
    parser.add_argument("--windows", type=int, default=8, help="of each reference and part")
    given = parser.parse_args(arguments)
    rows = []
    every = list[OfReference]()
    for data in given.data:
        with one_line_errors():
            photographs, foreign = read_sets(data, given.unknown, given.weights, given.cache)
        for frames in FRAMES:
            measured = [
                measure_reference(photographs, foreign, frames, seed, given.windows)
                for seed in range(given.references)
            ]
            every += measured
            rows.append(describe(measured, data.name, frames))
            print(rows[-1], file=sys.stderr, flush=True)
    rows.append(describe(every, "all", ""))

    if given.json:
        results = [
            Result(
                case=f"alarms, {part}",
                ours=100 * float(count_alarms(every, part).mean()),
                unit="%",
                runs=len(every) * given.windows,
            )
            for part in PARTS
        ]
        report(results, as_json=True)
    else:
        print(markdown(["set", "per object", *PARTS.values(), *CHANGES], rows))
    is_above = any(estimate_rate(count_alarms(every, part))[1] > GOAL for part in PARTS)
    is_late = any((reference.delays[LAMP] or math.inf) > WINDOW for reference in every)
    return int(is_above or is_late)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
