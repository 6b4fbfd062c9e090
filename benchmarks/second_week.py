"""A second week: photographs that a network was not sure of are labelled, and `train` runs again.

    python benchmarks/second_week.py --photos NAME=TRAIN,TEST ... --unknown DIR --model NAME --weights FILE
        --cache DIR [--size 10] [--labels 60] [--wrong 5] [--draws 2] [--first 0] [--json]

TRAIN and TEST are folders <class>/*.jpg, --unknown photographs of other things, <folder>/*.jpg.
A draw takes --size photographs per class of TRAIN for the first `train`; its others are the
traffic. Of those that a server would keep (`known` is false, or a margin below 0.2), --labels
by lot are labelled, --wrong of these wrongly, and named as the server names them. Then `train`
runs again. Both networks are measured on all of TEST and on --unknown, so that the differences
are paired; the cache of features is in --cache.

"rejected" is the share of --unknown that is not known, "accepted" that of TEST that is. "holds"
is the share of printed intervals that contain the accuracy on TEST, "accepted holds" that of
the intervals of the accepted share. Exit status 1: after the second week, over 2 points fewer
are rejected in a set, or fewer than 90 % of the intervals of the accuracy hold.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from copied_photos import draws_parser, parse_draws, test_logits, train_on
from measure import Result, keep_draw, one_line_errors, report

from sopdeploy.decision import log_sum_exp, softmax
from sopdeploy.errors import DataError
from sopdeploy.training.few_shot.state import FewShotFit
from sopdeploy.training.results import FewShotResult

LOW_MARGIN = 0.2  # of a photograph that a server keeps


def link(files: list[tuple[str, Path, str]], folder: Path) -> None:
    """Link *files*, each with its class, path and new name, into *folder*."""
    for label, path, name in files:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).symlink_to(path.resolve())


def measure(
    given: argparse.Namespace, name: str, photos: Path, run: Path
) -> tuple[dict[str, Any], Any]:
    """Train on *photos* and measure on TEST and on --unknown; also return the threshold."""
    shutil.rmtree(run, ignore_errors=True)
    fit = train_on(given, photos, run).fit
    rule = fit.decision.rejection if fit.decision else None
    if (
        not isinstance(fit, FewShotFit)
        or not isinstance(fit.result, FewShotResult)
        or rule is None
    ):
        raise DataError(f"{photos}: no threshold was fitted; give a larger --size")
    best, score = run / "best.pt", fit.result.top1
    tested, targets = test_logits(best, given.photos[name][1])
    unknown, _ = test_logits(best, given.unknown)
    accuracy = float((tested.argmax(axis=1) == targets).mean())
    accepted = float((log_sum_exp(tested) >= rule.threshold).mean())
    low, high = rule.accepted or (0.0, 1.0)
    measured = {
        "accuracy": 100 * accuracy,
        "printed": 100 * (0.0 if score is None else score.share),
        "holds": 100.0 * (score is not None and score.low <= accuracy <= score.high),
        "accepted": 100 * accepted,
        "accepted holds": 100.0 * (low <= accepted <= high),
        "rejected": 100 * float((log_sum_exp(unknown) < rule.threshold).mean()),
    }
    return measured, rule.threshold


def run_draw(given: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Measure both weeks of a draw; results are cached."""
    path: Path = given.cache / f"{name}-{given.size}-{given.labels}-{given.wrong}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    random, folder = np.random.default_rng(seed), given.cache / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    train = given.photos[name][0]
    labels = sorted(one.name for one in train.iterdir() if one.is_dir())
    own: list[tuple[str, Path, str]] = []
    traffic: set[tuple[str, str]] = set()
    for label in labels:
        files = [
            (label, file, file.name)
            for file in random.permutation(sorted((train / label).iterdir()))
        ]
        own += files[: given.size]
        traffic |= {(label, file.name) for _, file, _ in files[given.size :]}
    link(own, folder)
    first, threshold = measure(given, name, folder, given.cache / "run")
    logits, targets = test_logits(given.cache / "run" / "best.pt", train)
    files_of_train = sorted((labels.index(one.parent.name), one) for one in train.glob("*/*"))
    largest = np.sort(softmax(logits), axis=1)
    is_kept = (log_sum_exp(logits) < threshold) | (largest[:, -1] - largest[:, -2] < LOW_MARGIN)
    kept = [
        (labels[target], file)
        for (target, file), keep, expected in zip(
            files_of_train, is_kept, targets.tolist(), strict=True
        )
        if target == expected and keep and (labels[target], file.name) in traffic
    ]
    chosen = [kept[index] for index in random.permutation(len(kept))[: given.labels]]
    named = [
        (
            labels[(labels.index(label) + 1) % len(labels)] if number < given.wrong else label,
            file,
            f"{number:032x}.jpg",
        )
        for number, (label, file) in enumerate(chosen)
    ]
    link(named, folder)
    second, _ = measure(given, name, folder, given.cache / "run")
    found = {"first": first, "second": second, "labelled": len(named)}
    keep_draw(path, found)
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = draws_parser(__doc__)
    parser.add_argument(
        "--photos", action="append", required=True, help="NAME=TRAIN,TEST: two folders"
    )
    parser.add_argument(
        "--unknown", type=Path, required=True, help="photographs of other things"
    )
    for name, default in (("size", 10), ("labels", 60), ("wrong", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parse_draws(parser, arguments)
    parts = [one.partition("=") for one in given.photos]
    given.photos = {
        name: [Path(path) for path in folders.split(",")] for name, _, folders in parts
    }
    results, passed, holds = [], True, []
    with one_line_errors():
        for name in given.photos:
            draws = [run_draw(given, name, seed) for seed in given.seeds]
            for key in draws[0]["first"]:
                first, second = (
                    np.mean([one[week][key] for one in draws]) for week in ("first", "second")
                )
                case = f"{name}, {key}"
                results.append(
                    Result(
                        case=case,
                        against="first week",
                        ours=float(second),
                        other=float(first),
                        unit="%",
                        runs=len(draws),
                    )
                )
                passed &= key != "rejected" or bool(second >= first - 2)
            holds += [one[week]["holds"] for one in draws for week in ("first", "second")]
    report(results, as_json=given.json)
    return 0 if passed and np.mean(holds) >= 90 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
