"""Capacity planning: replicas, cores and Gbit/s for a rate of images, checked by simulation.

    python benchmarks/capacity.py --rate 100,1000000 --engine 2,0.4 --decode-ms 2.6 --loop-ms 0.5 --p99-ms 50

Prints a row of the model for each rate, then a simulation of single images with random, round-robin and
least-loaded balancing and with the loss of one replica. A plan with more than eight replicas is simulated
with eight, each at its rate in the plan. The model describes random balancing and is an upper bound of p99
for the other strategies. It exits with 1 if batch size, p50 or p99 with random balancing differ from the
model by more than `BOUND`, or if the p99 of another strategy exceeds the model by more. docs/scaling.md
explains the inputs.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from capacity_model import Forecast, System
from capacity_plan import Row, Wanted, cores_each, plan, provisioned
from capacity_simulation import Figures, Outcome, Route, Simulation
from measure import Result, report

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
    """A simulation compared with the model: ratios are simulated / predicted."""

    rate: float
    strategy: str
    replicas: int
    figures: Figures
    batch: float
    p50: float
    p99: float
    refused: int
    lost: int
    holds: bool


def check(
    model: Forecast, strategy: str, outcome: Outcome, figures: Figures, row: Row, replicas: int
) -> Check:
    """Compare the simulated *figures* with *model* and check the bound."""
    ratios = (figures.batch / model.batch, figures.p50_ms / model.p50_ms, figures.p99_ms / model.p99_ms)
    above = ratios[2] <= 1 + BOUND
    both = all(abs(ratio - 1) <= BOUND for ratio in ratios)
    few = outcome.refused <= MOST_REFUSED * outcome.sent
    return Check(
        rate=row.rate,
        strategy=strategy,
        replicas=replicas,
        figures=figures,
        batch=ratios[0],
        p50=ratios[1],
        p99=ratios[2],
        refused=outcome.refused,
        lost=outcome.lost,
        holds=few and (above if strategy in {"round-robin", "least-loaded"} else both),
    )


def checks(system: System, row: Row, images: int, held: int) -> Iterator[Check]:
    """Simulate *row* with each strategy, *images* images each."""
    replicas = min(row.replicas, MOST_SIMULATED)
    settled = 5 * row.lost.p99_ms
    for number, route in enumerate(ROUTES):
        fleet = Simulation(system, replicas=replicas, route=route, held=held, seed=number)
        outcome = fleet.poisson(replicas * row.each, images)
        yield check(row.now, route, outcome, outcome.measured(settled), row, replicas)
    # The remaining replicas receive the rate that they would have in the whole plan after the loss of one.
    rate = row.rate * (replicas - 1) / (row.replicas - 1)
    lose_at = settled + 250 * images / rate
    outcome = Simulation(system, replicas=replicas, held=held, seed=9).poisson(rate, images, lose_at)
    figures = outcome.measured(lose_at + settled)
    yield check(row.lost, "one lost", outcome, figures, row, replicas - 1)


def line(row: Row) -> str:
    """Format *row* as a table row."""
    now = row.now
    times = f"{now.batch:.1f} | {now.p50_ms:.1f} | {now.p99_ms:.1f} | {row.lost.p99_ms:.1f}"
    needs = f"{row.cores:,.1f} | {row.gbit_per_s:,.2f} | {row.held:.1f}"
    return f"| {row.rate:,.0f} | {row.replicas:,} | {row.each:,.1f} | {times} | {needs} |"


def facts(system: System, wanted: Wanted) -> str:
    """Describe one replica in one line."""
    limits = ", ".join(f"{name} {rate:,.0f}" for name, rate in system.limits.items())
    cores = cores_each(system, wanted)
    return f"one replica: {system.decoders} decoders, {cores} cores; images/s at most: {limits}"


def show(found: list[Check]) -> None:
    """Print the simulations and their ratios to the model."""
    print("\n| images/s | strategy | simulated | batch | p50 ms | p99 ms | refused | lost | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in found:
        seen = one.figures
        values = ((seen.batch, one.batch), (seen.p50_ms, one.p50), (seen.p99_ms, one.p99))
        shown = " | ".join(f"{value:.1f} ({ratio:.3f})" for value, ratio in values)
        ends = f"{one.refused} | {one.lost} | {'' if one.holds else '**off**'}"
        print(f"| {one.rate:,.0f} | {one.strategy} | {one.replicas} | {shown} | {ends} |")
    off = sum(not one.holds for one in found)
    print(f"\nin parentheses: simulated / predicted; {off} of {len(found)} exceed the bound of {BOUND:.0%}")


def results(rows: list[Row], found: list[Check]) -> list[Result]:
    """Build the results: replicas and p99 of each plan, then simulated values compared with the model."""
    plans = [
        Result(case=f"{row.rate:,.0f} images/s: {what}", ours=value, unit=unit, runs=1)
        for row in rows
        for what, value, unit in (
            ("replicas", row.replicas, "replicas"),
            ("p99", row.now.p99_ms, "ms"),
            ("p99 with one lost", row.lost.p99_ms, "ms"),
        )
    ]
    return plans + [
        Result(case=f"{one.rate:,.0f} images/s, {one.strategy}: {what}", against="model", ours=value,
               other=value / ratio, unit=unit, runs=1)
        for one in found
        for what, value, ratio, unit in (
            ("batch size", one.figures.batch, one.batch, "images"),
            ("p50", one.figures.p50_ms, one.p50, "ms"),
            ("p99", one.figures.p99_ms, one.p99, "ms"),
        )
    ]  # fmt: skip


def amounts(text: str) -> list[float]:
    """Parse comma-separated non-negative numbers; raises `ValueError`."""
    found = [float(part) for part in text.split(",")]
    if not all(0 <= number < math.inf for number in found):
        raise ValueError(text)
    return found


def amount(text: str) -> float:
    """Parse one non-negative number; raises `ValueError`."""
    (found,) = amounts(text)
    return found


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rate", type=amounts, default=[1e2, 1e3, 1e4, 1e5, 1e6], help="images per second")
    made.add_argument("--engine", type=amounts, required=True, help="ms per batch and per image: 2,0.4")
    made.add_argument("--batch", type=int, default=32, help="images in the largest batch")
    made.add_argument("--decode-ms", type=amount, required=True, help="CPU ms of decoding an image")
    made.add_argument("--loop-ms", type=amount, required=True, help="CPU ms per request without decoding")
    made.add_argument("--decode-lock-ms", type=amount, default=0.0, help="part of it with Python's lock")
    made.add_argument("--batch-lock-ms", type=amount, default=0.0, help="CPU ms of batching an image")
    made.add_argument("--front-ends", type=int, default=1, help="front ends per runtime")
    made.add_argument("--kilobytes", type=amount, default=50.0, help="size of an image")
    made.add_argument(
        "--p99-ms", type=amount, required=True, help="required p99 after the loss of one replica"
    )
    made.add_argument("--headroom", type=amount, default=0.3, help="fraction of the capacity to keep free")
    made.add_argument("--engine-cores", type=amount, default=0.0, help="threads of a CPU runtime")
    made.add_argument("--queue-size", type=int, default=256, help="maximum number of images per replica")
    made.add_argument("--images", type=int, default=40_000, help="images per simulation; 0: no simulation")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def planned(given: argparse.Namespace) -> tuple[System, Wanted, list[Row]]:
    """Compute the replica, the requirements and the rows; raises `ValueError`."""
    if len(given.engine) != 2 or not sum(given.engine) or given.batch < 1 or given.front_ends < 1:
        raise ValueError(
            "--engine takes two numbers, not both 0; --batch and --front-ends must be at least 1"
        )
    if given.decode_lock_ms > given.decode_ms:
        raise ValueError("--decode-lock-ms is a part of --decode-ms and must not exceed it")
    if given.headroom >= 1 or not all(given.rate):
        raise ValueError("--headroom must be below 1 and every --rate above 0")
    fixed, each = given.engine
    system = provisioned(
        System(
            fixed_ms=fixed,
            each_ms=each,
            largest=given.batch,
            decode_ms=given.decode_ms,
            loop_ms=given.loop_ms,
            decoders=1,
            decode_lock_ms=given.decode_lock_ms,
            batch_lock_ms=given.batch_lock_ms,
            front_ends=given.front_ends,
        )
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
        report(results(rows, found), as_json=True, images_per_simulation=images)
    else:
        print(facts(system, wanted), HEAD, *map(line, rows), sep="\n")
        if found:
            show(found)
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
