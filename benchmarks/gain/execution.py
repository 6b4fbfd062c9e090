"""Execute many runs in single-threaded processes, cache results, print progress on stderr."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import pydantic

from gain.study import Study
from gain.train_and_measure import Outcome, Run, train_and_measure

OnDone = Callable[[int, Outcome], None]


def read_cached(cache: Path | None, run: Run) -> Outcome | None:
    """Read the cached outcome of *run*; None if it is missing or damaged."""
    if cache is None:
        return None
    with suppress(OSError, pydantic.ValidationError):
        return Outcome.model_validate_json((cache / f"{run.key}.json").read_bytes())
    return None


def write_cached(cache: Path | None, run: Run, outcome: Outcome) -> None:
    """Write *outcome* to *cache* atomically."""
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{run.key}.{os.getpid()}.part"
    partial.write_text(outcome.model_dump_json(), encoding="utf-8")
    partial.replace(cache / f"{run.key}.json")


def execute_or_read(runs: Sequence[Run], cache: Path | None, jobs: int, on_done: OnDone) -> list[Outcome]:
    """Execute or read all runs; return outcomes in order. *on_done* receives each with its position."""
    outcomes: dict[int, Outcome] = {}
    waiting: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        known = read_cached(cache, run)
        if known is None:
            waiting.setdefault(run.key, []).append(position)
        else:
            outcomes[position] = known
            on_done(position, known)
    for position, outcome in execute({p[0]: runs[p[0]] for p in waiting.values()}, jobs):
        write_cached(cache, runs[position], outcome)
        for same in waiting[runs[position].key]:
            outcomes[same] = outcome
            on_done(same, outcome)
    return [outcomes[position] for position in range(len(runs))]


def execute(runs: dict[int, Run], jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yield outcomes as they are completed; a single job runs in this process."""
    if jobs == 1:
        yield from ((position, train_and_measure(run)) for position, run in runs.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        futures = {pool.submit(train_and_measure, run): position for position, run in runs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Results = dict[str, dict[str, list[Outcome]]]  # by study and arm, in the order of the seeds


def run_studies(studies: Sequence[Study], cache: Path | None, jobs: int) -> Results:
    """Execute all runs of *studies*; return the outcomes of each arm in the order of the seeds."""
    flat = [(study, arm, seed, run) for study in studies for arm, seed, run in study.runs()]
    start, count = time.monotonic(), 0

    def print_progress(position: int, outcome: Outcome) -> None:
        nonlocal count
        count += 1
        study, arm, seed, _ = flat[position]
        print(
            f"[{count}/{len(flat)}, {time.monotonic() - start:.0f} s] {study.name}, seed {seed}, {arm}: "
            f"{outcome.accuracy:.2f} % in {outcome.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    outcomes = execute_or_read([run for *_, run in flat], cache, jobs, print_progress)
    results: Results = {study.name: {arm: [] for arm in study.arms} for study in studies}
    for (study, arm, _, _), outcome in zip(flat, outcomes, strict=True):
        results[study.name][arm].append(outcome)
    return results
