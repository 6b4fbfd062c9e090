"""Accuracy of the few-shot head on large photographs that are decoded in full, and at the scale of the rules.

    python benchmarks/decoding.py --photos NAME=FOLDER ... --weights FILE [--size 10] [--draws 20] [--json]

FOLDER has photographs <class>/*.jpg. Each is decoded twice, in full and scaled, and read by
EfficientNet-Lite0 with the weights FILE. A draw takes --size photographs per class, at most half of them,
and tests on the others.
The head is fitted and calibrated by the code of `train`: for "scaled" to scaled photographs, for "served
scaled" to full ones; both test on scaled ones. Differences are to the same draw in full, with 95 % intervals
over draws. As draws share photographs, "all sets" has intervals over photographs, each by its mean over the
draws that test it.

Exit status 1: the accuracy over all photographs falls by more than 1 point.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import Result, make_parser, one_line_errors, report
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import t

from sopdeploy.photos.folder import open_evaluation_images
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.few_shot.classifier import (
    MAX_RANK,
    LinearProblem,
    Scaling,
    Space,
    Targets,
    unit_length,
)
from sopdeploy.training.few_shot.features import PROJECTION_IMAGES, CachedNetwork, full_head
from sopdeploy.training.few_shot.run import make_folds
from sopdeploy.training.recipe import FewShotConfig, read_recipe
from sopdeploy.training.start_weights import create_initial_model

Array = NDArray[Any]
MAX_LOSS = 1.0  # points
WAYS = {"full": ("full", "full"), "scaled": ("scaled", "scaled"), "served scaled": ("full", "served scaled")}


class Photographs(NamedTuple):
    """Classes (N,), vectors (N, D) by decoding, and the columns of the parts of a vector.

    For "scaled", the projections are fitted to scaled photographs, for the others to full ones.
    """

    classes: Array
    vectors: dict[str, Array]
    parts: list[slice]


class Draw(NamedTuple):
    """Probabilities (T, K) of the T test photographs by the `WAYS`, their classes and numbers (T,)."""

    probabilities: dict[str, Array]
    classes: Array
    tested: Array

    def right(self, way: str) -> Array:
        """Return 100 for each test photograph that is classified correctly, 0 for the others."""
        return 100.0 * (self.probabilities[way].argmax(axis=1) == self.classes)


@torch.no_grad()
def compute_vectors(folder: Path, weights: Path) -> Photographs:
    """Decode the photographs of *folder* in both ways, and compute their vectors."""
    labels = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    images = open_evaluation_images(folder, labels)
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    batches, vectors = {}, {}
    for decoding in ("full", "scaled"):
        options = ["data.path=.", f"start.weights={weights}", f"preprocess.decoding={decoding}"]
        recipe = read_recipe("photos", options)
        model, recipe, _ = create_initial_model(recipe, labels, Strategy(torch.device("cpu")))
        network = CachedNetwork(full_head(recipe, model), recipe)
        batches[decoding] = list(network.batches(images, order))
    pooled = network.network.pooled_head  # a projection is fitted below, the rest is equal
    for name, fitted, read in (
        ("full", "full", "full"),
        ("served scaled", "full", "scaled"),
        ("scaled", "scaled", "scaled"),
    ):
        first = batches[fitted][: PROJECTION_IMAGES // network.batch_size]
        pooled.fit_projection([batch.maps for batch in first])
        vectors[name] = np.zeros((len(images), network.network.num_features()), np.float32)
        for batch in batches[read]:
            outputs = pooled.vector(batch.own_vectors, batch.maps)
            vectors[name][batch.indices] = outputs.float().cpu().numpy()
    return Photographs(images.targets.astype(np.int64), vectors, list(pooled.columns()))


def run_draw(photos: Photographs, size: int, seed: int) -> Draw:
    """Fit heads to full and to scaled photographs of a draw; apply them to its other photographs."""
    random, count = np.random.default_rng(seed), int(photos.classes.max()) + 1
    drawn: list[int] = []
    for label in range(count):
        of_class = random.permutation(np.flatnonzero(photos.classes == label))
        drawn += of_class[: min(size, len(of_class) // 2)].tolist()
    tested = np.setdiff1d(np.arange(len(photos.classes)), drawn)
    classes, heads = photos.classes[drawn], {}
    targets = Targets(np.eye(count)[classes], classes, "softmax")
    folds = make_folds(targets, [str(index) for index in drawn], FewShotConfig().folds, seed)
    for decoding in ("full", "scaled"):
        vectors = photos.vectors[decoding][drawn]
        parts = [vectors[:, part] for part in photos.parts]
        space = Space.of([part[:MAX_RANK] for part in parts])
        problem = LinearProblem(space, space.project(vectors), unit_length(parts[0]), targets)
        scaling = Scaling.fit([problem.cross_validate(one) for one in folds], targets)
        heads[decoding] = problem.fit_all(scaling)
    return Draw(
        {
            way: softmax(heads[trained].logits(photos.vectors[read][tested]), axis=1)
            for way, (trained, read) in WAYS.items()
        },
        photos.classes[tested],
        tested,
    )


def half_interval(gains: Array) -> float:
    """Return half of the 95 % interval of the mean of *gains*."""
    return float(t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5)


def measure(name: str, photos: Photographs, run: list[Draw]) -> list[Result]:
    """Measure the draws of a set: accuracies, differences, and how much the probabilities change."""
    draws = len(run)
    accuracies = {way: np.array([draw.right(way).mean() for draw in run]) for way in WAYS}
    rows = [
        Result(case=f"{name}: photographs", ours=len(photos.classes), unit="", runs=1),
        Result(case=f"{name}: full", ours=accuracies["full"].mean(), unit="%", runs=draws),
    ]
    for way in ("scaled", "served scaled"):
        gains = accuracies[way] - accuracies["full"]
        pairs = [(draw.probabilities["full"], draw.probabilities[way]) for draw in run]
        changes = 100 * np.concatenate([np.abs(one - other).ravel() for one, other in pairs])
        others = np.concatenate([one.argmax(axis=1) != other.argmax(axis=1) for one, other in pairs])
        values = {
            "accuracy": (accuracies[way].mean(), "%"),
            "difference": (gains.mean(), "points"),
            "half of its interval": (half_interval(gains), "points"),
            "mean change of a probability": (changes.mean(), "points"),
            "99 % of the changes are below": (np.quantile(changes, 0.99), "points"),
            "other top-1": (100 * others.mean(), "%"),
        }
        rows += [
            Result(case=f"{name}, {way}: {key}", ours=float(value), unit=unit, runs=draws)
            for key, (value, unit) in values.items()
        ]
    return rows


def gains_of_photographs(run: list[Draw], way: str) -> Array:
    """Return the mean difference of each photograph that was tested, in points."""
    tested = np.concatenate([draw.tested for draw in run])
    gains = np.concatenate([draw.right(way) - draw.right("full") for draw in run])
    counts = np.bincount(tested)
    return (np.bincount(tested, gains) / np.maximum(counts, 1))[counts > 0]


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", action="append", required=True, help="NAME=FOLDER with <class>/*.jpg")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of EfficientNet-Lite0")
    parser.add_argument("--size", type=int, default=10, help="photographs per class")
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args(arguments)
    rows: list[Result] = []
    gains: dict[str, list[Array]] = {"scaled": [], "served scaled": []}
    with one_line_errors():
        for text in given.photos:
            name, _, folder = text.partition("=")
            photos = compute_vectors(Path(folder), given.weights)
            run = [run_draw(photos, given.size, seed) for seed in range(given.draws)]
            rows += measure(name, photos, run)
            for way, of_sets in gains.items():
                of_sets.append(gains_of_photographs(run, way))
    losses = []
    for way, of_sets in gains.items():
        of_all = np.concatenate(of_sets)
        losses.append(-float(of_all.mean()))
        values = {
            "photographs": (float(len(of_all)), ""),
            "difference": (-losses[-1], "points"),
            "half of its interval": (half_interval(of_all), "points"),
            "photographs with a difference": (float((of_all != 0).sum()), ""),
        }
        rows += [
            Result(case=f"all sets, {way}: {key}", ours=value, unit=unit, runs=given.draws)
            for key, (value, unit) in values.items()
        ]
    report(rows, as_json=given.json)
    return int(max(losses) > MAX_LOSS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
