"""Fine-tuning on photographs with and without DSoP branches, from fitted heads.

    python benchmarks/photo_branches.py --photos NAME=FOLDER ... --weights FILE --cache DIR --lines FILE
        [--epochs 4 16] [--draws 20] [--search-epochs 4] [--search-draws 5] [--report] [--json]
        [--heads-only] [--per-class 10] [--limit 60]

FOLDER has a folder of photographs for each class, of which --limit are chosen by lot. Each draw trains on
--per-class photographs of each class and tests on others. --heads-only compares the second-order head with
its fine-tuning and runs no other trained arms.

Frozen arms are the heads that `train` fits to EfficientNet-Lite0 with the ImageNet weights FILE: on averages,
and on averages with two second-order statistics. All other arms start from these and train the stages behind
the third: AdamW, warm-up and cosine, random crops, label smoothing. Arms with branches are tested after these
are detached. "equal time" trains at least as long as DSoP, in processor seconds.

The learning rate of each arm, set and length is the best on --search-draws draws, which nothing else uses; a
grid whose best rate is on its edge becomes wider. All arms have the same draws, so their differences are
paired, with intervals which know that draws share photographs for testing. --lines receives a line of JSON
for each arm and draw; finished ones are not repeated, and all sets have a draw before the next one starts.
The last epoch counts. One thread.

The share is DSoP's gain, divided by the gain of the second-order head after the same fine-tuning. Its
interval is a bootstrap over the draws.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gain.execution import Line, add_options
from gain.paired import paired
from gain.photos import MAX_PER_CLASS, PhotosConfig, count_classes, write_maps
from gain.report import accuracies, run_and_report
from gain.study import Study
from measure import existing, make_parser, one_line_errors

FROZEN, FROZEN_HEAD = "frozen, averages", "frozen, second-order head"
PLAIN, LONGER, HEAD = "averages", "averages, equal time", "second-order head"
GAP_BRANCHES, DSOP = "averages, GAP branches", "averages, DSoP, detached"
PAIRS = (
    (FROZEN_HEAD, FROZEN),
    (HEAD, FROZEN_HEAD),
    (DSOP, GAP_BRANCHES),
    (DSOP, LONGER),
    (DSOP, FROZEN_HEAD),
)


def study(name: str, task: PhotosConfig, given: argparse.Namespace, epochs: int) -> Study:
    """Build the study of a set after a training of *epochs*."""
    frozen: dict[str, dict[str, Any]] = {
        FROZEN: {"epochs": 0},
        FROZEN_HEAD: {"network": "head-photos", "epochs": 0},
    }
    trained: dict[str, dict[str, Any]] = {
        PLAIN: {},
        LONGER: {"epochs": 2 * epochs},
        GAP_BRANCHES: {"network": "dsop-photos", "config": {"aux_pooling": "gap"}},
        DSOP: {"network": "dsop-photos"},
        HEAD: {"network": "head-photos"},
    }
    if given.heads_only:
        trained = {HEAD: trained[HEAD]}
    rates = (1e-4, 3e-4, 1e-3)
    return Study(
        name=f"{name}, {epochs} epochs",
        images=name,
        title=f"{task.classes} classes, {task.per_class} photographs of each",
        seeds=tuple(range(given.draws or 20)),
        template={
            "task": task,
            "network": "photos",
            "epochs": epochs,
            "batch": 8,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "label_smoothing": 0.1,
            "learning_rate": rates[0],
        },
        arms={**frozen, **trained},
        reference=FROZEN if given.heads_only else PLAIN,
        pairs=PAIRS[:2] if given.heads_only else PAIRS,
        rates=rates,
        search=tuple(trained),
    )


def share(arms: Mapping[str, list[Line]]) -> str:
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
    parser.add_argument(
        "--heads-only", action="store_true", help="run the arms of the second-order head only"
    )
    parser.add_argument("--per-class", type=int, default=10, help="photographs for training (10)")
    parser.add_argument("--limit", type=int, default=MAX_PER_CLASS, help="photographs of a class (60)")
    add_options(parser, epochs=4)
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
    studies = [study(name, task, given, epochs) for epochs in given.epochs for name, task in tasks.items()]
    chosen, results = run_and_report(studies, given)
    for one in chosen:
        if results[one.name] and not (given.json or given.heads_only):
            print(f"{one.name}: {share(results[one.name])}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
