"""Planted wrong labels that `data check --wrong-labels` lists, against cleanlab on the same probabilities.

    python benchmarks/wrong_labels.py --data DIR --model NAME --weights FILE --cache DIR
        [--size 50] [--shares 0.03,0.08] [--similar shirt,t-shirt,longsleeve] [--draws 6] [--first 0]
        [--json]

--data is a folder of photographs, <class>/*.jpg. Each draw takes --size photographs per class and moves a
share of them to another class: any class, and in a second run among the classes --similar only. `sopdeploy
train` runs with default options; the cache of features is in --cache. Ours is the list of `data check
--wrong-labels`; cleanlab's is that of `find_label_issues` with default options on the same out-of-fold
probabilities, "contradicted" are all labels that are not the most probable class. "listed" counts
photographs, "right" is the share of these that were moved, "found" the share of the moved ones that are
listed. Needs `pip install cleanlab==2.9.0`. Exit status 1: the mean of both shares is below cleanlab's.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from cleanlab.filter import find_label_issues
from copied_photos import draws_parser, parse_draws, train_on
from measure import Result, keep_draw, one_line_errors, report

from sopdeploy.decision import softmax
from sopdeploy.errors import DataError
from sopdeploy.photos.folder import list_classes
from sopdeploy.report.wrong_labels import find_wrong_labels
from sopdeploy.training.few_shot.state import FewShotFit


def run_draw(
    given: argparse.Namespace, share: float, similar: list[str], seed: int
) -> dict[str, list[float]]:
    """Train on one draw and list its wrong labels; results are cached."""
    path: Path = given.cache / f"labels-{share}-{'similar' if similar else 'any'}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    folder, run = given.cache / "images" / path.stem, given.cache / "run-labels"
    for previous in (folder, run):
        shutil.rmtree(previous, ignore_errors=True)
    source = random.Random(seed)  # noqa: S311  # not a secret
    labels = sorted(path.name for path in given.data.iterdir() if path.is_dir())
    drawn = [
        (label, file)
        for label in labels
        for file in source.sample(sorted((given.data / label).iterdir()), given.size)
    ]
    count = round(share * len(drawn))
    moved = set(source.sample([file for label, file in drawn if not similar or label in similar], count))
    for label, file in drawn:
        other = (
            source.choice([name for name in similar or labels if name != label]) if file in moved else label
        )
        (folder / other).mkdir(parents=True, exist_ok=True)
        (folder / other / file.name).symlink_to(file.resolve())
    fit = train_on(given, folder, run).fit
    names = {file.name for file in moved}
    images = list_classes(folder).images
    if not isinstance(fit, FewShotFit) or fit.label_logits is None:
        raise DataError(f"{folder}: not trained by the few-shot procedure; give fewer photographs")
    probabilities = softmax(fit.label_logits)
    files = np.asarray([images.path(index).name for index in range(len(images))])
    listed = {
        "ours": {Path(one.file).name for one in find_wrong_labels(run)},
        "cleanlab": set(files[find_label_issues(images.targets, probabilities)]),
        "contradicted": set(files[probabilities.argmax(axis=1) != images.targets]),
    }
    measured = {
        name: [len(found), 100 * len(found & names) / max(1, len(found)), 100 * len(found & names) / count]
        for name, found in listed.items()
    }
    keep_draw(path, measured)
    return measured


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = draws_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="photographs to draw from, <class>/*.jpg")
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument(
        "--shares", type=lambda text: [float(one) for one in text.split(",")], default=[0.03, 0.08]
    )
    parser.add_argument(
        "--similar", type=lambda text: text.split(","), default=["shirt", "t-shirt", "longsleeve"]
    )
    given = parse_draws(parser, arguments)
    results, passed = [], True
    with one_line_errors():
        for share, similar in [(share, []) for share in given.shares] + [(given.shares[0], given.similar)]:
            draws = [run_draw(given, share, similar, seed) for seed in given.seeds]
            means = {name: np.mean([one[name] for one in draws], axis=0) for name in draws[0]}
            kind = "among " + ", ".join(similar) if similar else "any class"
            for against in ("cleanlab", "contradicted"):
                for place, unit in ((0, "listed"), (1, "% right"), (2, "% found")):
                    ours, other = (float(means[name][place]) for name in ("ours", against))
                    case = f"{100 * share:g} % wrong, {kind}"
                    results.append(
                        Result(case=case, against=against, ours=ours, other=other, unit=unit, runs=len(draws))
                    )
            passed &= bool(means["ours"][1:].mean() >= means["cleanlab"][1:].mean())
    report(results, as_json=given.json, threads=os.environ.get("OMP_NUM_THREADS", "all"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
