"""How many replicas, cores and Gbit/s does a rate of images need, and is the arithmetic true?

    python benchmarks/capacity.py --rate 100,1000000 --engine 2,0.4 --decode-ms 2.6 --loop-ms 0.5 --p99-ms 50

Prints a row of the model for each rate, then what a simulation of single images gives for it: replicas that
are chosen at random, in turn or by least load, and one of them lost. More than eight replicas are simulated
by eight at the same rate each. Ends with 1 where model and simulation differ by more than `BOUND`: sizes of
batches, p50 and p99 where replicas are chosen at random, which is what the model computes; otherwise the
model is an upper bound of p99. Where the figures come from: docs/scaling.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from capacity_model import Forecast, System
from capacity_plan import Row, Wanted, cores_each, plan, provisioned
from capacity_simulation import Figures, Outcome, Route, Simulation

BOUND = 0.10
MOST_REFUSED = 0.001
MOST_SIMULATED = 8
ROUTES: tuple[Route, ...] = ("random", "round-robin", "least-loaded")
HEAD = (
    "| images/s | replicas | images/s each | batch | p50 ms | p99 ms | p99 ms, one lost | cores | Gbit/s in "
    "| held each |\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A simulation beside the model: ratios are simulated / forecast."""

    rate: float
    way: str
    replicas: int
    figures: Figures
    batch: float
    p50: float
    p99: float
    refused: int
    lost: int
    holds: bool


def check(model: Forecast, way: str, outcome: Outcome, figures: Figures, row: Row, replicas: int) -> Check:
    """Return how far *figures* are from what *model* says, and whether that is within the bound."""
    ratios = (figures.batch / model.batch, figures.p50_ms / model.p50_ms, figures.p99_ms / model.p99_ms)
    above = ratios[2] <= 1 + BOUND
    both = all(abs(ratio - 1) <= BOUND for ratio in ratios)
    few = outcome.refused <= MOST_REFUSED * outcome.sent
    return Check(
        rate=row.rate,
        way=way,
        replicas=replicas,
        figures=figures,
        batch=ratios[0],
        p50=ratios[1],
        p99=ratios[2],
        refused=outcome.refused,
        lost=outcome.lost,
        holds=few and (above if way in {"round-robin", "least-loaded"} else both),
    )


def checks(system: System, row: Row, images: int, held: int) -> Iterator[Check]:
    """Yield the simulations of *row*, *images* in each."""
    replicas = min(row.replicas, MOST_SIMULATED)
    settled = 5 * row.lost.p99_ms
    for number, route in enumerate(ROUTES):
        fleet = Simulation(system, replicas=replicas, route=route, held=held, seed=number)
        outcome = fleet.poisson(replicas * row.each, images)
        yield check(row.now, route, outcome, outcome.measured(settled), row, replicas)
    # As fast that the replicas left get what those of the whole plan get when it has lost one.
    rate = row.rate * (replicas - 1) / (row.replicas - 1)
    lose_at = settled + 250 * images / rate
    outcome = Simulation(system, replicas=replicas, held=held, seed=9).poisson(rate, images, lose_at)
    figures = outcome.measured(lose_at + settled)
    yield check(row.lost, "one lost", outcome, figures, row, replicas - 1)


def line(row: Row) -> str:
    """Return *row* as a line of the table."""
    now = row.now
    times = f"{now.batch:.1f} | {now.p50_ms:.1f} | {now.p99_ms:.1f} | {row.lost.p99_ms:.1f}"
    needs = f"{row.cores:,.1f} | {row.gbit_per_s:,.2f} | {row.held:.1f}"
    return f"| {row.rate:,.0f} | {row.replicas:,} | {row.each:,.1f} | {times} | {needs} |"


def facts(system: System, wanted: Wanted) -> str:
    """Return what holds for every row, in one line."""
    limits = ", ".join(f"{name} {rate:,.0f}" for name, rate in system.limits.items())
    cores = cores_each(system, wanted)
    return f"one replica: {system.decoders} decoders, {cores} cores; images/s at most: {limits}"


def show(found: list[Check]) -> None:
    """Print the simulations beside the model."""
    print("\n| images/s | way | simulated | batch | p50 ms | p99 ms | refused | lost | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in found:
        seen = one.figures
        values = ((seen.batch, one.batch), (seen.p50_ms, one.p50), (seen.p99_ms, one.p99))
        shown = " | ".join(f"{value:.1f} ({ratio:.3f})" for value, ratio in values)
        ends = f"{one.refused} | {one.lost} | {'' if one.holds else '**off**'}"
        print(f"| {one.rate:,.0f} | {one.way} | {one.replicas} | {shown} | {ends} |")
    off = sum(not one.holds for one in found)
    print(f"\nin brackets: simulated / forecast; bound {BOUND:.0%}: {off} of {len(found)} beyond it")


def amounts(text: str) -> list[float]:
    """Return the numbers of at least 0 in *text*, with commas between; raises `ValueError`."""
    found = [float(part) for part in text.split(",")]
    if not all(0 <= number < math.inf for number in found):
        raise ValueError(text)
    return found


def amount(text: str) -> float:
    """Return the one number of at least 0 in *text*; raises `ValueError`."""
    (found,) = amounts(text)
    return found


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rate", type=amounts, default=[1e2, 1e3, 1e4, 1e5, 1e6], help="images per second")
    made.add_argument("--engine", type=amounts, required=True, help="ms of a batch and of an image: 2,0.4")
    made.add_argument("--batch", type=int, default=32, help="images in the largest batch")
    made.add_argument("--decode-ms", type=amount, required=True, help="CPU ms of decoding an image")
    made.add_argument("--loop-ms", type=amount, required=True, help="CPU ms of a request beside decoding")
    made.add_argument("--kilobytes", type=amount, default=50.0, help="of an image on the wire")
    made.add_argument("--p99-ms", type=amount, required=True, help="to be kept with one replica lost")
    made.add_argument("--headroom", type=amount, default=0.3, help="share of capacity to leave free")
    made.add_argument("--engine-cores", type=amount, default=0.0, help="threads of the engine, on a CPU")
    made.add_argument("--queue-size", type=int, default=256, help="images that a replica holds at most")
    made.add_argument("--images", type=int, default=40_000, help="to simulate each way; 0: none")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def planned(given: argparse.Namespace) -> tuple[System, Wanted, list[Row]]:
    """Return the replica, the wishes and the rows that *given* asks for; raises `ValueError`."""
    if len(given.engine) != 2 or not sum(given.engine) or given.batch < 1:
        raise ValueError("--engine takes two numbers, not both 0; --batch is at least 1")
    if given.headroom >= 1 or not all(given.rate):
        raise ValueError("--headroom is below 1, every --rate above 0")
    fixed, each = given.engine
    system = provisioned(
        engine=(fixed, each), largest=given.batch, decode_ms=given.decode_ms, loop_ms=given.loop_ms
    )
    wanted = Wanted(
        p99_ms=given.p99_ms,
        headroom=given.headroom,
        kilobytes=given.kilobytes,
        engine_cores=given.engine_cores,
    )
    return system, wanted, plan(system, wanted, given.rate)


def main() -> int:
    """Run from the command line; return the exit code."""
    reader = parser()
    given = reader.parse_args()
    try:
        system, wanted, rows = planned(given)
    except ValueError as problem:
        reader.error(str(problem))
    images = given.images
    found = [one for row in rows for one in checks(system, row, images, given.queue_size)] if images else []
    if given.json:
        shown = [asdict(row) | {"each": row.each, "held": row.held} for row in rows]
        document = {"system": asdict(system), "wanted": asdict(wanted), "rows": shown, "bound": BOUND}
        print(json.dumps(document | {"checks": [asdict(one) for one in found]}, indent=2))
    else:
        print(facts(system, wanted), HEAD, *map(line, rows), sep="\n")
        if found:
            show(found)
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
