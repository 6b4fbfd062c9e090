"""Time and memory of the few-shot head and of the search for near-duplicates in large folders.

    python benchmarks/large_folders.py [--photos 3068,20000,100000] [--steps search,head] [--json]

The features are random, with the shapes of those of EfficientNet-Lite0: per photograph five views of 432
channels for the search, 1,024 coordinates and the network's own vector of 1,280 numbers for the head. One
photograph in a hundred is a copy of another one. Each step runs in a process of its own, on one thread; times
are those of the processor, memory is the largest of the process, with its features.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import Result, make_parser, report
from numpy.typing import NDArray

from sopdeploy.photos.copies import SMALL, connect, find_near_duplicates
from sopdeploy.training.few_shot.classifier import LinearProblem, Scaling, Space, Targets, unit_length
from sopdeploy.training.few_shot.run import make_folds

CLASSES, VIEWS, CHANNELS, OWN, RANK, FOLDS = 10, 5, (112, 320), 1280, 1024, 10
Array = NDArray[Any]


def draw(random: np.random.Generator, classes: Array, width: int) -> NDArray[np.float32]:
    """Draw vectors (N, width) around a mean of each class."""
    means = random.standard_normal((CLASSES, width), np.float32)
    vectors = random.standard_normal((len(classes), width), np.float32)
    vectors += means[classes]
    return vectors


def search(count: int) -> float:
    """Search near-duplicates among *count* photographs; return the seconds."""
    random = np.random.default_rng(0)
    classes = random.integers(0, CLASSES, count)
    views = []
    for width in CHANNELS:
        part = np.empty((count, VIEWS, width), np.float32)
        part[:, 0] = draw(random, classes, width)
        part[1::100, 0] = part[0::100, 0][: len(part[1::100])]
        for corner in range(1, VIEWS):
            part[:, corner] = part[:, 0] + 0.5 * random.standard_normal((count, width), np.float32)
        views.append(part)
    small = random.integers(0, 256, (count, SMALL, SMALL), np.uint8)
    small[1::100] = small[0::100][: len(small[1::100])]
    since = time.process_time()
    pairs = find_near_duplicates(views, small, classes, list(map(str, range(count)))).pairs
    groups = connect(count, pairs)
    seconds = time.process_time() - since
    if len(set(groups.tolist())) != count - len(range(1, count, 100)):
        raise RuntimeError("the search has not found exactly the copies")
    return seconds


def head(count: int) -> float:
    """Cross-validate, calibrate and fit the head of *count* photographs; return the seconds."""
    random = np.random.default_rng(0)
    classes = random.integers(0, CLASSES, count)
    targets = Targets(np.eye(CLASSES)[classes], classes, "softmax")
    space = Space(np.zeros(RANK), np.ones(RANK), np.eye(RANK))
    own = unit_length(draw(random, classes, OWN))
    problem = LinearProblem(space, draw(random, classes, RANK), own, targets)
    since = time.process_time()
    folds = make_folds(targets, list(map(str, range(count))), FOLDS, 0)
    scaling = Scaling.fit([problem.cross_validate(one) for one in folds], targets)
    problem.fit_all(scaling)
    for one in folds:
        problem.cosines(one)
    problem.cosines_without_class()
    return time.process_time() - since


STEPS: dict[str, Callable[[int], float]] = {"search": search, "head": head}


def run_step(name: str, count: int) -> tuple[float, float]:
    """Return the seconds of a step, and the largest memory of this process in GB."""
    seconds = STEPS[name](count)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", default="3068,20000,100000", help="numbers of photographs")
    parser.add_argument("--steps", default=",".join(STEPS))
    given = parser.parse_args(arguments)
    results = []
    for name in given.steps.split(","):
        for count in map(int, given.photos.split(",")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(run_step, (name, count))
            results.append(Result(case=f"{name}, {count:,} photographs", ours=seconds, unit="cpu-s", runs=1))
            results.append(Result(case=f"{name}, {count:,}, memory", ours=memory, unit="GB", runs=1))
            print(results[-2].case, f"{seconds:.1f} s, {memory:.2f} GB", file=sys.stderr, flush=True)
    report(results, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
