"""Intervals that `train` prints for real frames of few objects, against frames of other objects.

    python benchmarks/real_clips.py --photos NAME=DIR ... --model NAME --weights FILE --cache DIR
        [--objects 2,3,5,10] [--frames 8] [--names kept,numbered] [--draws 3] [--first 0] [--json]

--photos may be repeated; DIR has <class>/<object>_<frame>.png or <class>/<object>-<view>.png,
real tracks or turns. A third of the objects of each class is the test. A draw takes --objects
of the others and --frames of each by lot. Their names are kept, or numbered as by a camera,
class by class without a gap: IMG_2001.png.

Each run is `sopdeploy train` with default options; the cache of features is in --cache.
Finished runs are not repeated. "holds" is the share of runs whose printed interval contains the
accuracy on the test, "divided" the mean number of groups of an object, "mixed" the share of
images in a group with another object. Exit status 1: fewer than 90 % of the intervals with kept
names hold.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from copied_photos import draws_parser, parse_draws, test_logits, train_on
from measure import Result, keep_draw, one_line_errors, report

from sopdeploy.errors import DataError
from sopdeploy.training.few_shot.state import FewShotFit
from sopdeploy.training.results import FewShotResult


def objects_of(folder: Path, test: bool) -> dict[str, list[list[Path]]]:
    """List the frames of each object of each class that is, or is not, in the test."""
    found = {}
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        frames: dict[str, list[Path]] = {}
        for path in sorted(label.iterdir()):
            frames.setdefault(re.split("[_-]", path.stem)[0], []).append(path)
        order = np.random.default_rng(0).permutation(sorted(frames)).tolist()
        num_tested = len(order) // 3
        chosen = order[:num_tested] if test else order[num_tested:]
        found[label.name] = [frames[name] for name in chosen]
    return found


def link(
    images: dict[str, list[list[Path]]], folder: Path, *, numbered: bool = False
) -> list[str]:
    """Link *images* into *folder*; return the objects of the files, sorted by their new names."""
    names: list[tuple[str, str]] = []
    for label, objects in images.items():
        (folder / label).mkdir(parents=True)
        for number, path in enumerate(path for frames in objects for path in frames):
            name = f"IMG_{2001 + number}{path.suffix}" if numbered else path.name
            (folder / label / name).symlink_to(path.resolve())
            names.append((f"{label}/{name}", f"{label}/{re.split('[_-]', path.stem)[0]}"))
    return [one for _, one in sorted(names)]


def run_draw(
    given: argparse.Namespace, name: str, count: int, seed: int, names: str
) -> dict[str, Any]:
    """Train on *count* objects of each class and test; results are cached."""
    path: Path = given.cache / f"{name}-{count}-{given.frames}-{names}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    source, folder, run = given.photos[name], given.cache / "images", given.cache / "run"
    for previous in (folder, run):
        shutil.rmtree(previous, ignore_errors=True)
    random = np.random.default_rng(100 * count + seed)
    drawn: dict[str, list[list[Path]]] = {}
    for label, objects in objects_of(source, test=False).items():
        chosen = [objects[index] for index in random.permutation(len(objects))[:count]]
        drawn[label] = [
            sorted(random.permutation(frames)[: given.frames].tolist()) for frames in chosen
        ]
    true = np.asarray(link(drawn, folder, numbered=names == "numbered"))
    fit = train_on(given, folder, run).fit
    if not isinstance(fit, FewShotFit) or not isinstance(fit.result, FewShotResult):
        raise DataError(f"{source}: not trained by the few-shot procedure; give fewer objects")
    test = given.cache / f"{name}-test"
    if not test.exists():
        link(objects_of(source, test=True), test)
    logits, targets = test_logits(run / "best.pt", test)
    accuracy, score = float((logits.argmax(axis=1) == targets).mean()), fit.result.top1
    mixed = [len(set(true[fit.groups == group])) > 1 for group in fit.groups]
    measured = {
        "accuracy": 100 * accuracy,
        "printed": None if score is None else 100 * score.share,
        "width": None if score is None else 100 * (score.high - score.low),
        "holds": None if score is None else 100.0 * (score.low <= accuracy <= score.high),
        "divided": float(
            np.mean([len(set(fit.groups[true == one])) for one in np.unique(true)])
        ),
        "mixed": 100 * float(np.mean(mixed)),
        "named": bool(fit.result.possible_clip),
    }
    keep_draw(path, measured)
    return measured


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = draws_parser(__doc__)
    parser.add_argument(
        "--photos", action="append", required=True, help="NAME=DIR: frames of real objects"
    )
    parser.add_argument(
        "--objects",
        type=lambda text: [int(one) for one in text.split(",")],
        default=[2, 3, 5, 10],
    )
    parser.add_argument("--frames", type=int, default=8, help="of each object")
    parser.add_argument(
        "--names", type=lambda text: text.split(","), default=["kept", "numbered"]
    )
    given = parse_draws(parser, arguments)
    given.photos = {
        name: Path(folder) for name, _, folder in (one.partition("=") for one in given.photos)
    }
    results, kept_holds = [], []
    with one_line_errors():
        for name in given.photos:
            for names in given.names:
                for count in given.objects:
                    runs = [run_draw(given, name, count, seed, names) for seed in given.seeds]
                    printed = [one for one in runs if one["printed"] is not None]
                    kept_holds += [one["holds"] for one in printed if names == "kept"]
                    for key in (
                        "accuracy",
                        "printed",
                        "width",
                        "holds",
                        "divided",
                        "mixed",
                        "named",
                    ):
                        values = [one[key] for one in printed]
                        if values:
                            case = f"{name}, {count} objects, names {names}, {key}"
                            unit = {"divided": "groups of an object", "named": "of runs"}.get(
                                key, "%"
                            )
                            results.append(
                                Result(
                                    case=case,
                                    ours=float(np.mean(values)),
                                    unit=unit,
                                    runs=len(values),
                                )
                            )
    report(results, as_json=given.json)
    return 0 if not kept_holds or np.mean(kept_holds) >= 90 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
