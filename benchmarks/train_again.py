"""A second `sopdeploy train` with a few new photographs, whose other features are in the cache.

    python benchmarks/train_again.py --data DIR --weights FILE [--per-class 20] [--added 1] [--runs 5]

DIR contains train/<class>/*.jpg. Each round starts with an empty cache, trains on --per-class photographs of
each class, and again with --added more, and imports torch alone, which both trainings do first. Each is a
process of one thread. A round before the others is not counted: modules without bytecode are compiled in it.
At the end, the second training is repeated without a cache. Exit status 1 if its weights are not equal bit
for bit, or if the second training takes more than `LIMIT` times the processor time of the import. A share of
the first training is no limit, because a slower first training would keep it.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import Result, existing, make_parser, report
from own_photos import draw, link, run

from sopdeploy.checkpoint import read_checkpoint

LIMIT = 2.5  # processor time of the second training, relative to the import of torch


def train(photographs: Path, weights: Path, place: Path, cache: Path) -> tuple[float, float]:
    """Train in a process and write the run to *place*; return its processor seconds and its wall seconds."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, "-m", "sopdeploy", "train", "--data", str(photographs), "--out", str(place)]
    began = time.perf_counter()
    seconds = run([*command, "--weights", str(weights)], cache.with_suffix(".log"))
    return seconds, time.perf_counter() - began


def import_torch(log: Path) -> tuple[float, float]:
    """Import torch in a process; return its processor seconds and its wall seconds."""
    began = time.perf_counter()
    return run([sys.executable, "-c", "import torch"], log), time.perf_counter() - began


def main() -> int:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True)
    parser.add_argument("--weights", type=existing, required=True)
    for name, default in (("--per-class", 20), ("--added", 1), ("--runs", 5)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # all modules would be compiled in each process
    sizes = (given.per_class, given.per_class + given.added)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = [link(draw(given.data, size, 0), folder / f"photos-{size}") for size in sizes]
        taken = []
        for number in range(1 + given.runs):
            places, cache = [folder / f"{number}-{size}" for size in sizes], folder / f"cache-{number}"
            pairs = zip(photos, places, strict=True)
            trainings = [train(one, given.weights, place, cache) for one, place in pairs]
            taken.append([*trainings, import_torch(folder / "import.log")])
        train(photos[1], given.weights, folder / "without", folder / "empty")
        weights = [read_checkpoint(place / "best.pt").weights for place in (places[1], folder / "without")]
    equal = all(bool((weights[1][name] == tensor).all()) for name, tensor in weights[0].items())
    results = []
    for clock, unit in enumerate(("cpu-s", "s")):
        first, second, torch = (statistics.median(of[kind][clock] for of in taken[1:]) for kind in range(3))
        for against, other in (("first", first), ("import of torch", torch)):
            results.append(
                Result(case="second", against=against, ours=second, other=other, unit=unit, runs=given.runs)
            )
    report(results, as_json=given.json, equal_without_cache=equal)
    return 0 if equal and results[1].ours <= LIMIT * (results[1].other or 0) else 1


if __name__ == "__main__":
    sys.exit(main())
