"""Many runs: two processes of one thread, finished ones read from a cache, progress on stderr."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import pydantic

from gain.run import Outcome, Run, carry_out
from gain.study import Study

Done = Callable[[int, Outcome], None]


def stored(cache: Path | None, run: Run) -> Outcome | None:
    """Return the outcome that *cache* holds of *run*; a file that is damaged counts as none."""
    if cache is None:
        return None
    with suppress(OSError, pydantic.ValidationError):
        return Outcome.model_validate_json((cache / f"{run.key}.json").read_bytes())
    return None


def store(cache: Path | None, run: Run, outcome: Outcome) -> None:
    """Put *outcome* into *cache*, whole or not at all."""
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{run.key}.{os.getpid()}.part"
    partial.write_text(outcome.model_dump_json(), encoding="utf-8")
    partial.replace(cache / f"{run.key}.json")


def finish(runs: Sequence[Run], cache: Path | None, jobs: int, on_done: Done) -> list[Outcome]:
    """Return the outcome of every run, in order; *on_done* is told the position of each as it comes."""
    outcomes: dict[int, Outcome] = {}
    waiting: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        known = stored(cache, run)
        if known is None:
            waiting.setdefault(run.key, []).append(position)
        else:
            outcomes[position] = known
            on_done(position, known)
    for position, outcome in carried_out({p[0]: runs[p[0]] for p in waiting.values()}, jobs):
        store(cache, runs[position], outcome)
        for same in waiting[runs[position].key]:
            outcomes[same] = outcome
            on_done(same, outcome)
    return [outcomes[position] for position in range(len(runs))]


def carried_out(runs: dict[int, Run], jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yield each outcome as it comes; one job needs no process of its own."""
    if jobs == 1:
        yield from ((position, carry_out(run)) for position, run in runs.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        futures = {pool.submit(carry_out, run): position for position, run in runs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Results = dict[str, dict[str, list[Outcome]]]  # by study and arm, in the order of the seeds


def finish_studies(studies: Sequence[Study], cache: Path | None, jobs: int) -> Results:
    """Return every arm's outcomes in the order of its study's seeds."""
    flat = [(study, arm, seed, run) for study in studies for arm, seed, run in study.runs()]
    start, count = time.monotonic(), 0

    def say(position: int, outcome: Outcome) -> None:
        nonlocal count
        count += 1
        study, arm, seed, _ = flat[position]
        print(
            f"[{count}/{len(flat)}, {time.monotonic() - start:.0f} s] {study.name}, seed {seed}, {arm}: "
            f"{outcome.accuracy:.2f} % in {outcome.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    outcomes = finish([run for *_, run in flat], cache, jobs, say)
    results: Results = {study.name: {arm: [] for arm in study.arms} for study in studies}
    for (study, arm, _, _), outcome in zip(flat, outcomes, strict=True):
        results[study.name][arm].append(outcome)
    return results
