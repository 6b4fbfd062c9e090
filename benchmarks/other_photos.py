"""Accuracy, log loss and `known` of the few-shot head on many kinds of photographs, against the former head.

    python benchmarks/other_photos.py --photos GROUP/NAME=TRAIN,TEST ... --unknown DIR --weights FILE
        --cache DIR [--sizes 10] [--draws 3] [--out FILE] [--json]

TRAIN and TEST are folders <class>/*.jpg, --unknown photographs of other things, <folder>/*.jpg.
GROUP tells which sets decided (A) and which confirmed (B, C, D). The features of
EfficientNet-Lite0 with the weights FILE are computed once per set and kept in --cache. Each
draw, whose seed is its number, takes --sizes photographs per class; the head is fitted and
calibrated by the code of `train`, and tested on all of TEST. It is compared with scikit-learn's
LogisticRegression, with C chosen by the loss in the same folds: "former", a former head of
`train`, reads the same vectors, "averages" only the network's own ones, averages of its
features.

"interval holds" is the share of --intervals draws in which the printed interval of the fraction
that the threshold accepts contains that of as many other photographs of the same classes: drawn
by lot from TRAIN and TEST together, or from TEST.

"others" are up to 40 test photographs of each other set. --measure names the sets to measure,
by default all. --out writes the means into a JSON file, of which `docs/generate.py` makes the
table of the page. Exit status 1: over sets of the groups B and C, the gain is below 0.
"""

import argparse
import json
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Result, make_parser, one_line_errors, report
from numpy.typing import NDArray
from photo_vectors import (
    FOLDS,
    class_folders,
    draw_photographs,
    fit_draw,
    join_vectors,
    open_network,
    read_batches,
)
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.known_threshold import choose_threshold
from sopdeploy.photos.evaluation_images import open_any_images, open_evaluation_images
from sopdeploy.training.few_shot.classifier import LinearProblem, Space, unit_length
from sopdeploy.training.few_shot.cross_validation import make_folds
from sopdeploy.training.few_shot.targets import Targets
from sopdeploy.training.recipe import RejectionConfig

Array = NDArray[Any]
STRENGTHS = 10.0 ** np.arange(0.5, 3.1, 0.5)  # of a logistic regression, scikit-learn's C
OTHERS = 40  # test photographs of each other set
ACCEPTS = RejectionConfig().accepts
NO_SPACE = Space(*np.zeros((3, 1)))  # of problems whose heads are not fitted


class Photographs(NamedTuple):
    """Vectors (N, D) of training and test photographs, whose first `own` columns are the network's own."""

    group: str
    train: Array
    classes: Array
    test: Array
    test_classes: Array
    own: int

    @property
    def parts(self) -> list[slice]:
        """The columns of the network's own vectors, and of the roots of two covariances."""
        middle = (self.own + self.train.shape[1]) // 2
        return [slice(self.own), slice(self.own, middle), slice(middle, self.train.shape[1])]


def compute_vectors(
    folders: list[Path], labels: list[tuple[str, ...] | None], weights: Path, cache: Path
) -> Any:
    """Compute or read the vectors and classes of *folders*; the first one determines the projections."""
    if cache.exists():
        return dict(np.load(cache))
    network = open_network(weights)
    found: dict[str, Array] = {}
    for number, (folder, names) in enumerate(zip(folders, labels, strict=True)):
        images = (
            open_any_images(folder) if names is None else open_evaluation_images(folder, names)
        )
        batches = read_batches(network, images)
        vectors = join_vectors(network, batches, () if number else batches)
        found |= {f"vectors{number}": vectors, f"classes{number}": images.targets}
    found["own"] = np.asarray(network.network.pooled_head.own_length)
    np.savez(cache, allow_pickle=False, **found)
    return found


def fit_logistic(inputs: Array, classes: Array, folds: Array) -> LogisticRegression:
    """Fit a logistic regression whose C has the smallest loss in *folds*."""
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that do not converge
        for strength in STRENGTHS:
            head, loss = LogisticRegression(C=strength, max_iter=500), 0.0
            for fold in np.unique(folds):
                tested = folds == fold
                head.fit(inputs[~tested], classes[~tested])
                columns = np.searchsorted(head.classes_, classes[tested])
                loss -= head.predict_log_proba(inputs[tested])[
                    np.arange(tested.sum()), columns
                ].sum()
            losses.append(loss)
        return LogisticRegression(C=STRENGTHS[int(np.argmin(losses))], max_iter=500).fit(
            inputs, classes
        )


def run_draw(
    photos: Photographs, size: int, seed: int, unknown: list[Array]
) -> dict[str, float]:
    """Fit both heads to a draw; measure them on the test photographs and on *unknown* ones."""
    random, count = np.random.default_rng(1000 * size + seed), int(photos.classes.max()) + 1
    drawn = draw_photographs(photos.classes, size, random)
    classes, vectors = photos.classes[drawn], photos.train[drawn]
    problem, folds, validations, scaling = fit_draw(
        vectors, classes, photos.parts, seed, drawn, count
    )
    space, reduced, own = problem.space, problem.reduced, vectors[:, : photos.own]
    cosines = np.mean([problem.cosines(one) for one in folds], axis=0)
    out_of_fold = (
        log_softmax(problem.logits(validations[0], scaling), axis=1) + cosines[:, None]
    )
    rule = fit_decision(
        out_of_fold,
        classes,
        estimated_on="cross-validation",
        scalable=False,
        left_out=problem.cosines_without_class(),
        are_cosines=True,
    ).rejection
    means = problem.class_means()
    threshold = -1.0 if rule is None else rule.threshold

    def accepted(vectors: Array) -> float:
        return 100 * float(
            ((unit_length(vectors[:, : photos.own]) @ means.T).max(axis=1) >= threshold).mean()
        )

    logits = problem.fit_all(scaling).logits(photos.test)
    averages = Space.of([own])
    projected = averages.project(own), averages.project(photos.test[:, : photos.own])
    compared = {
        "former": fit_logistic(reduced, classes, folds[0]).predict_log_proba(
            space.project(photos.test)
        ),
        "averages": fit_logistic(projected[0], classes, folds[0]).predict_log_proba(
            projected[1]
        ),
    }
    rows, answers = np.arange(len(logits)), photos.test_classes
    return {
        "accuracy": 100 * float((logits.argmax(axis=1) == answers).mean()),
        **{
            f"{name} accuracy": 100 * float((one.argmax(axis=1) == answers).mean())
            for name, one in compared.items()
        },
        "log loss": -float(log_softmax(logits, axis=1)[rows, answers].mean()),
        **{
            f"{name} log loss": -float(one[rows, answers].mean())
            for name, one in compared.items()
        },
        "accepted": accepted(photos.test),
        "unknown rejected": 100 - accepted(unknown[0]),
        "others rejected": 100 - accepted(unknown[1]),
        "new class rejected": 0.0
        if rule is None or rule.new_class is None
        else 100 * rule.new_class[0] / len(drawn),
    }


def interval_holds(photos: Photographs, size: int, draws: int, *, by_lot: bool) -> float:
    """Return the share of *draws*, in percent, whose interval contains the accepted share of new photographs.

    A draw takes *size* photographs per class, and as many other ones of each class as are
    there. With *by_lot*, both are drawn from all photographs, otherwise the new ones from the
    test photographs first.
    """
    vectors = np.concatenate([photos.train, photos.test])
    own, classes = (
        unit_length(vectors[:, : photos.own]),
        np.concatenate([photos.classes, photos.test_classes]),
    )
    is_test, count, held = np.arange(len(own)) >= len(photos.train), int(classes.max()) + 1, 0
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(own))
        if not by_lot:
            order = order[np.argsort(is_test[order], kind="stable")]
        by_class = [order[classes[order] == label] for label in range(count)]
        drawn = np.concatenate([of_class[:size] for of_class in by_class])
        new = np.concatenate([of_class[size:][-size:] for of_class in by_class])
        targets = Targets(np.eye(count)[classes[drawn]], classes[drawn], "softmax")
        problem = LinearProblem(NO_SPACE, own[drawn][:, :1], own[drawn], targets)
        folds = make_folds(targets, [str(index) for index in drawn.tolist()], FOLDS, seed)
        cosines = np.mean([problem.cosines(one) for one in folds], axis=0)
        threshold = choose_threshold(cosines, ACCEPTS, are_cosines=True)
        if threshold is None:
            continue
        low, high = threshold.accepted
        accepted = ((own[new] @ problem.class_means().T).max(axis=1) >= threshold.value).mean()
        held += int(low <= accepted <= high)
    return 100 * held / draws


def read_sets(given: argparse.Namespace) -> tuple[dict[str, Photographs], Array]:
    """Read or compute the vectors of all sets and of the unknown photographs."""
    given.cache.mkdir(parents=True, exist_ok=True)
    sets = {}
    for text in given.photos:
        key, _, paths = text.partition("=")
        group, _, name = key.partition("/")
        folders = [Path(path) for path in paths.split(",")]
        labels = class_folders(folders[0])
        found = compute_vectors(
            folders, [labels, labels], given.weights, given.cache / f"{group}-{name}.npz"
        )
        train, classes, test, test_classes = (
            found[key] for key in ("vectors0", "classes0", "vectors1", "classes1")
        )
        sets[key] = Photographs(group, train, classes, test, test_classes, int(found["own"]))
    unknown = compute_vectors(
        [given.unknown], [None], given.weights, given.cache / "unknown.npz"
    )
    return sets, unknown["vectors0"]


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--photos", action="append", required=True, help="GROUP/NAME=TRAIN,TEST: two folders"
    )
    parser.add_argument(
        "--unknown",
        type=Path,
        required=True,
        help="photographs of other things, <folder>/*.jpg",
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="ImageNet weights of EfficientNet-Lite0"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder of vectors")
    parser.add_argument("--sizes", default="10", help="numbers of photographs per class")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--intervals", type=int, default=100, help="draws that check the printed interval"
    )
    parser.add_argument("--measure", help="names of sets, joined by commas")
    parser.add_argument("--out", type=Path, help="JSON file of the means")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with one_line_errors():
        sets, unknown = read_sets(given)
        for measured_key, photos in sets.items():
            name = measured_key.partition("/")[2]
            if given.measure and not {name, measured_key} & {*given.measure.split(",")}:
                continue
            others = [
                other.test[:: max(1, len(other.test) // OTHERS)][:OTHERS]
                for key, other in sets.items()
                if key.partition("/")[2] != name  # a set may be in two groups
            ]
            foreign = [
                unknown,
                np.concatenate(
                    [part for part in others if part.shape[1] == photos.test.shape[1]]
                ),
            ]
            for size in map(int, given.sizes.split(",")):
                draws = [run_draw(photos, size, seed, foreign) for seed in range(given.draws)]
                means = {key: float(np.mean([one[key] for one in draws])) for key in draws[0]}
                for key, by_lot in (
                    ("interval holds", True),
                    ("interval holds in TEST", False),
                ):
                    means[key] = interval_holds(photos, size, given.intervals, by_lot=by_lot)
                facts = {
                    "group": photos.group,
                    "name": name,
                    "size": size,
                    "draws": given.draws,
                }
                rows.append({**facts, "date": f"{datetime.now(UTC):%Y-%m-%d}", **means})
    results = [
        Result(
            case=f"{row['group']}/{row['name']}, {row['size']} per class, {key}",
            ours=value,
            unit="" if "loss" in key else "%",
            runs=given.draws,
        )
        for row in rows
        for key, value in row.items()
        if isinstance(value, float)
    ]
    report(results, as_json=given.json)
    if given.out is not None:
        measured = [(row["group"], row["name"], row["size"]) for row in rows]
        before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else []
        kept = [
            row for row in before if (row["group"], row["name"], row["size"]) not in measured
        ]
        given.out.write_text(json.dumps([*kept, *rows], indent=1) + "\n", encoding="utf-8")
    gains = [row["accuracy"] - row["former accuracy"] for row in rows if row["group"] != "A"]
    return 1 if gains and np.mean(gains) < 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
