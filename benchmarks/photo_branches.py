"""Fine-tuning on photographs with and without DSoP branches, from fitted heads.

    python benchmarks/photo_branches.py --photos NAME=FOLDER ... --weights FILE --cache DIR --lines FILE
        [--draws 20] [--report] [--json] [--heads-only] [--per-class 10] [--limit 60]

FOLDER has a folder of photographs for each class, of which --limit are chosen by lot. Each draw trains on
--per-class photographs of each class and tests on others. --heads-only compares the second-order head with
its fine-tuning and runs no other trained arms.

Frozen arms are the heads that `train` fits to EfficientNet-Lite0 with the ImageNet weights FILE: on averages,
and on averages with two second-order statistics. All other arms start from these and train the stages behind
the third: AdamW, warm-up and cosine, random crops, label smoothing. Arms with branches are tested after these
are detached. "equal time" trains at least as long as DSoP, in processor seconds.

The learning rate of each arm and set is the best of `RATES` on the draws `SEARCH_DRAWS`, which nothing else
uses. All arms have the same draws, so their differences are paired. --lines receives a line of JSON for each
arm and draw; finished ones are not repeated, and all sets have a draw before the next one starts. The last
epoch counts. One thread.

The share is DSoP's gain, divided by the gain of the second-order head after the same fine-tuning. Its
interval is a bootstrap over the draws.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from gain.paired import paired
from gain.photos import MAX_PER_CLASS, PhotosConfig, count_classes, write_maps
from gain.report import accuracies, results_of, table
from gain.study import Study
from gain.train_and_measure import Outcome, Run, train_and_measure
from measure import commit, existing, make_parser, one_line_errors, report

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write

RATES = (1e-4, 3e-4, 1e-3)
SEARCH_DRAWS = (100,)
EPOCHS, LONG = 4, 8
FROZEN, FROZEN_HEAD = "frozen, averages", "frozen, second-order head"
PLAIN, LONGER, HEAD = "averages", "averages, equal time", "second-order head"
GAP_BRANCHES, DSOP = "averages, GAP branches", "averages, DSoP, detached"
TRAINED: dict[str, dict[str, Any]] = {
    PLAIN: {},
    LONGER: {"epochs": LONG},
    GAP_BRANCHES: {"network": "dsop-photos", "config": {"aux_pooling": "gap"}},
    DSOP: {"network": "dsop-photos"},
    HEAD: {"network": "head-photos"},
}
PAIRS = (
    (FROZEN_HEAD, FROZEN),
    (HEAD, FROZEN_HEAD),
    (DSOP, GAP_BRANCHES),
    (DSOP, LONGER),
    (DSOP, FROZEN_HEAD),
)


class Line(StrictModel):
    """Accuracy in percent and CPU seconds of an arm on a draw of a set; `key` names all inputs of the run."""

    photos: str
    arm: str
    draw: int
    rate: float
    accuracy: float
    seconds: float
    loss: float
    date: str
    key: str


class Lines:
    """The file of finished runs; unless *may_run*, others are a `ConfigError`."""

    def __init__(self, path: Path, *, may_run: bool) -> None:
        self.path, self.may_run = path, may_run
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.lines = [Line.model_validate_json(text) for text in texts]
        self.by_run = {(line.photos, line.key): line for line in self.lines}

    def run(self, photos: str, arm: str, run: Run) -> Outcome:
        """Read or execute *run*, and write its line."""
        line = self.by_run.get((photos, run.key))
        if line is None:
            if not self.may_run:
                raise ConfigError(f"{self.path}: has no draw {run.seed} of {photos}, {arm}; omit --report")
            outcome = train_and_measure(run)
            shown = {name: round(value, 4) for name, value in outcome.model_dump().items()}
            date = datetime.now(UTC).date().isoformat()
            line = Line(
                photos=photos, arm=arm, draw=run.seed, rate=run.learning_rate, date=date, key=run.key, **shown
            )
            print(f"{photos}, draw {run.seed}, {arm}: {line.accuracy:.1f} %", file=sys.stderr, flush=True)
            self.lines.append(line)
            with atomic_write(self.path) as partial:
                partial.write_text("".join(f"{one.model_dump_json()}\n" for one in self.lines))
            self.by_run[photos, run.key] = line
        return Outcome(accuracy=line.accuracy, seconds=line.seconds, loss=line.loss)


def study(name: str, task: PhotosConfig, draws: Sequence[int], rates: Mapping[str, float]) -> Study:
    """Build the study of a set; *rates* are the learning rates of the arms that are trained."""
    template = {
        "task": task,
        "network": "photos",
        "epochs": EPOCHS,
        "batch": 8,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
        "learning_rate": RATES[0],
    }
    frozen: dict[str, dict[str, Any]] = {
        FROZEN: {"epochs": 0},
        FROZEN_HEAD: {"network": "head-photos", "epochs": 0},
    }
    trained = {arm: {**TRAINED[arm], "learning_rate": rate} for arm, rate in rates.items()}
    arms = {**frozen, **trained}
    return Study(
        name=name,
        title=f"{task.classes} classes, {task.per_class} photographs of each",
        seeds=tuple(draws),
        template=template,
        arms=arms,
        reference=PLAIN if PLAIN in arms else FROZEN,
        pairs=tuple(pair for pair in PAIRS if arms.keys() >= set(pair)),
    )


def search(name: str, task: PhotosConfig, lines: Lines, trained: Sequence[str]) -> dict[str, float]:
    """Choose the rate of each of *trained*: the largest mean accuracy; of equal ones the smallest rate."""
    means: dict[str, dict[float, float]] = {arm: {} for arm in trained}
    for rate in RATES:
        compared = study(name, task, SEARCH_DRAWS, dict.fromkeys(trained, rate))
        for arm in trained:
            runs = [compared.run(arm, draw) for draw in SEARCH_DRAWS]
            means[arm][rate] = fmean(lines.run(name, arm, run).accuracy for run in runs)
    return {arm: max(RATES, key=lambda rate: of_rates[rate]) for arm, of_rates in means.items()}


def share(arms: Mapping[str, list[Outcome]]) -> str:
    """Describe the share of the second-order head's gain that the detached network has."""
    plain, dsop, head = (np.array(accuracies(arms[arm])) for arm in (PLAIN, DSOP, HEAD))
    gain = paired(accuracies(arms[HEAD]), accuracies(arms[PLAIN]))
    if len(plain) < 2 or gain.mean - gain.half <= 0:
        return "the second-order head has no significant gain, so there is no share"
    resamples = np.random.default_rng(0).integers(0, len(plain), (10_000, len(plain)))
    ratios = (dsop - plain)[resamples].mean(axis=1) / (head - plain)[resamples].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = (dsop - plain).mean() / (head - plain).mean()
    return f"share of the head's gain: {100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def finished(lines: Lines, one: Study) -> dict[str, list[Outcome]]:
    """Return the outcomes of the draws that all arms have."""
    draws = [
        draw
        for draw in one.seeds
        if all((one.name, one.run(arm, draw).key) in lines.by_run for arm in one.arms)
    ]
    return {arm: [lines.run(one.name, arm, one.run(arm, draw)) for draw in draws] for arm in one.arms}


def run_all(studies: Sequence[Study], lines: Lines) -> Iterator[int]:
    """Run every arm of every set, draw by draw; yield the number of draws that are done."""
    for number, draw in enumerate(studies[0].seeds, 1):
        for one in studies:
            for arm in one.arms:
                lines.run(one.name, arm, one.run(arm, draw))
        yield number


def named_folder(text: str) -> tuple[str, Path]:
    """Convert NAME=FOLDER, as `type` of an option."""
    name, _, folder = text.partition("=")
    return name, existing(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--photos", type=named_folder, action="append", required=True, help="NAME=FOLDER; can be repeated"
    )
    parser.add_argument("--weights", type=existing, required=True, help="EfficientNet-Lite0's weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder of outputs of the frozen stages")
    parser.add_argument("--lines", type=Path, required=True, help="file with a line per arm and draw")
    parser.add_argument("--draws", type=int, default=20, help="number of draws (20)")
    parser.add_argument("--report", action="store_true", help="print the finished draws, and run nothing")
    parser.add_argument(
        "--heads-only", action="store_true", help="run the arms of the second-order head only"
    )
    parser.add_argument("--per-class", type=int, default=10, help="photographs for training (10)")
    parser.add_argument("--limit", type=int, default=MAX_PER_CLASS, help="photographs of a class (60)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the arms that are not finished, and print the tables."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    given.cache.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for name, folder in given.photos:
        others = "" if given.limit == MAX_PER_CLASS else f"-{given.limit}"
        maps = given.cache.resolve() / f"{name}{others}.npz"
        if not maps.exists():
            write_maps(folder, given.weights, maps, given.limit)
        sizes = {"classes": count_classes(maps), "per_class": given.per_class}
        tasks[name] = PhotosConfig(maps=maps, weights=given.weights.resolve(), **sizes)
    lines = Lines(given.lines, may_run=not given.report)
    trained = (HEAD,) if given.heads_only else tuple(TRAINED)
    rates = {name: search(name, task, lines, trained) for name, task in tasks.items()}
    studies = [study(name, task, range(given.draws), rates[name]) for name, task in tasks.items()]
    if not given.report:
        for number in run_all(studies, lines):
            print(f"{number} of {given.draws} draws", file=sys.stderr, flush=True)
    results = {one.name: finished(lines, one) for one in studies}
    if given.json:
        rows = [result for one in studies for result in results_of(one, results[one.name])]
        report(rows, as_json=True, commit=commit())
        return 0
    for one in studies:
        arms = results[one.name]
        print(f"{one.name}: {one.title}, {len(arms[HEAD])} draws; rates {json.dumps(rates[one.name])}\n")
        if arms[HEAD] and given.heads_only:
            print(", ".join(f"{arm} {fmean(accuracies(outcomes)):.1f} %" for arm, outcomes in arms.items()))
        elif arms[HEAD]:
            print(f"{table(one, arms)}\n\n{share(arms)}\n")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
