"""Accuracy of the few-shot head on large photographs that are decoded in full, and at the scale of the rules.

    python benchmarks/decoding.py --photos NAME=FOLDER ... --weights FILE [--size 10] [--draws
    20] [--json]

FOLDER has photographs <class>/*.jpg. Each is decoded twice, in full and scaled, and read by
EfficientNet-Lite0 with the weights FILE. A draw takes --size photographs per class, at most
half of them, and tests on the others. The head is fitted and calibrated by the code of `train`:
for "scaled" to scaled photographs, for "served scaled" to full ones; both test on scaled ones.
Differences are to the same draw in full, with 95 % intervals over draws. As draws share
photographs, "all sets" has intervals over photographs, each by its mean over the draws that
test it.

Exit status 1: the accuracy over all photographs falls by more than 1 point.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Result, make_parser, one_line_errors, report
from numpy.typing import NDArray
from photo_vectors import (
    class_folders,
    draw_photographs,
    fit_draw,
    join_vectors,
    open_network,
    read_batches,
)
from scipy.special import softmax
from scipy.stats import t

from sopdeploy.photos.evaluation_images import open_evaluation_images

Array = NDArray[Any]
MAX_LOSS = 1.0  # points
WAYS = {
    "full": ("full", "full"),
    "scaled": ("scaled", "scaled"),
    "served scaled": ("full", "served scaled"),
}


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


def compute_vectors(folder: Path, weights: Path) -> Photographs:
    """Decode the photographs of *folder* in both ways, and compute their vectors."""
    images = open_evaluation_images(folder, class_folders(folder))
    networks = {
        name: open_network(weights, f"preprocess.decoding={name}")
        for name in ("full", "scaled")
    }
    batches = {name: read_batches(network, images) for name, network in networks.items()}
    network = networks[
        "full"
    ]  # only the projections, which are fitted below, differ from "scaled"
    vectors = {
        name: join_vectors(network, batches[read], batches[fitted])
        for name, fitted, read in (
            ("full", "full", "full"),
            ("served scaled", "full", "scaled"),
            ("scaled", "scaled", "scaled"),
        )
    }
    parts = list(network.network.pooled_head.columns())
    return Photographs(images.targets.astype(np.int64), vectors, parts)


def run_draw(photos: Photographs, size: int, seed: int) -> Draw:
    """Fit heads to full and to scaled photographs of a draw; apply them to its other photographs."""
    counts = np.bincount(photos.classes)
    sizes = np.minimum(size, counts // 2)
    drawn = draw_photographs(photos.classes, sizes, np.random.default_rng(seed))
    tested = np.setdiff1d(np.arange(len(photos.classes)), drawn)
    heads = {}
    for decoding in ("full", "scaled"):
        vectors, classes = photos.vectors[decoding][drawn], photos.classes[drawn]
        found = fit_draw(vectors, classes, photos.parts, seed, drawn, len(counts))
        heads[decoding] = found.problem.fit_all(found.scaling)
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
        others = np.concatenate(
            [one.argmax(axis=1) != other.argmax(axis=1) for one, other in pairs]
        )
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
    parser.add_argument(
        "--photos", action="append", required=True, help="NAME=FOLDER with <class>/*.jpg"
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="ImageNet weights of EfficientNet-Lite0"
    )
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
