"""What a pass of `compare` means: how often a bundle passes, by how much better or worse it really is.

    .venv/bin/python benchmarks/gate.py --out docs/benchmarks/gate_2026-12-01.json

Simulated photos are vectors of overlapping Gaussian classes, and classifiers are linear discriminants. The live one
learned from some photos. A server then keeps a random sample of new ones, which a person labels. A new classifier
learns from both; to make it worse, a share of its labels is wrong, or it does not see some components. Each new
classifier meets two gates with the rule of `compare`:

- "half": half of the sample is not learned, and decides
- "out of fold": all of the sample is learned and decides, and cross-validation answers for the new classifier

The true difference of the two classifiers is measured on `TEST` other photos.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.evaluation.statistics import Z_90, score_statistic
from sopdeploy_commands.compare import MIN_IMAGES, TOLERANCE, narrow_tolerance

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
CLASSES = 6
COMPONENTS = 24
FOLDS = 5
RIDGE = 0.3
TEST = 5_000
# Percentage points of the true difference: the gate must refuse what is left of the first edge.
EDGES = (-5, -2.5, 0, 2.5, 5, 10)


class Photos(NamedTuple):
    """Vectors (N, D) and classes (N,)."""

    vectors: Array
    labels: Labels

    def part(self, chosen: NDArray[np.bool_]) -> "Photos":
        return Photos(self.vectors[chosen], self.labels[chosen])

    def joined(self, other: "Photos") -> "Photos":
        return Photos(
            np.concatenate([self.vectors, other.vectors]),
            np.concatenate([self.labels, other.labels]),
        )


def draw(rng: np.random.Generator, means: Array, count: int) -> Photos:
    """Draw *count* photos of classes with *means* (K, D)."""
    labels = rng.integers(0, CLASSES, count)
    return Photos(means[labels] + rng.normal(size=(count, COMPONENTS)), labels)


def fit(photos: Photos) -> Array:
    """Fit a linear discriminant: weights (D + 1, K)."""
    rows = np.concatenate([photos.vectors, np.ones((len(photos.labels), 1))], axis=1)
    targets = np.eye(CLASSES)[photos.labels] - 1 / CLASSES
    gram = rows.T @ rows + RIDGE * len(rows) * np.eye(COMPONENTS + 1)
    return np.linalg.solve(gram, rows.T @ targets)


def are_right(weights: Array, photos: Photos) -> NDArray[np.bool_]:
    """Tell which *photos* (N,) a classifier with *weights* classifies correctly."""
    return (photos.vectors @ weights[:-1] + weights[-1]).argmax(axis=1) == photos.labels


def passes(old: NDArray[np.bool_], new: NDArray[np.bool_]) -> bool:
    """Apply the rule of `compare` to what both classifiers get right (N,)."""
    count = len(old)
    wins, losses = int((new & ~old).sum()), int((old & ~new).sum())
    tolerance = narrow_tolerance(TOLERANCE, count) / 100
    return count >= MIN_IMAGES and score_statistic(wins, losses, count, -tolerance) >= Z_90


def spoil(rng: np.random.Generator, photos: Photos, share: float, hidden: int) -> Photos:
    """Give a *share* of *photos* random labels, and hide their last components."""
    is_wrong = rng.random(len(photos.labels)) < share
    labels = np.where(is_wrong, rng.integers(0, CLASSES, len(photos.labels)), photos.labels)
    vectors = photos.vectors.copy()
    vectors[:, COMPONENTS - hidden :] = 0
    return Photos(vectors, labels)


def simulate(rng: np.random.Generator, num_sampled: int) -> dict[str, tuple[float, bool]]:
    """Let a new classifier meet both gates; the true difference and the answer of each."""
    means = rng.uniform(0.35, 0.7) * rng.normal(size=(CLASSES, COMPONENTS))
    first = draw(rng, means, int(rng.choice([60, 150, 400])))
    sample = draw(rng, means, num_sampled)
    others = draw(rng, means, num_sampled)  # kept because they were not sure, or collected
    test = draw(rng, means, TEST)
    old = fit(first)

    # Nothing, wrong labels, or lost components; those of the sample itself are looked at by a person.
    share, hidden = rng.choice([0.0, 0.3, 0.6]), int(rng.choice([0, 0, 6, 10]))
    learned = spoil(rng, first.joined(others), share, hidden)
    whole = Photos(spoil(rng, sample, 0, hidden).vectors, sample.labels)
    is_half = rng.random(num_sampled) < 0.5

    # Half decides, and the new classifier has not learned it.
    of_half = fit(learned.joined(whole.part(~is_half)))
    difference = are_right(of_half, test).mean() - are_right(old, test).mean()
    decided = sample.part(is_half)
    answers = {
        "half": (
            float(difference),
            passes(are_right(old, decided), are_right(of_half, decided)),
        )
    }

    # All decide: each photo is answered by a classifier without its fold.
    of_all = fit(learned.joined(whole))
    fold = rng.integers(0, FOLDS, num_sampled)
    fold_learned = rng.integers(0, FOLDS, len(learned.labels))
    right = np.zeros(num_sampled, np.bool_)
    for number in range(FOLDS):
        without = fit(learned.part(fold_learned != number).joined(whole.part(fold != number)))
        right[fold == number] = are_right(without, sample.part(fold == number))
    difference = are_right(of_all, test).mean() - are_right(old, test).mean()
    answers["out of fold"] = float(difference), passes(are_right(old, sample), right)
    return answers


def main() -> None:
    """Simulate, and write the share of passes by gate, number of sampled photos and true difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    rows = []
    for num_sampled in (78, 120, 240):
        rng = np.random.default_rng(num_sampled)
        rounds = [simulate(rng, num_sampled) for _ in range(arguments.rounds)]
        for gate in ("half", "out of fold"):
            points = np.array([100 * one[gate][0] for one in rounds])
            passed = np.array([one[gate][1] for one in rounds])
            bins = np.digitize(points, EDGES)
            rows.append(
                {
                    "gate": gate,
                    "sampled": num_sampled,
                    "bins": [
                        {
                            "from": None if number == 0 else EDGES[number - 1],
                            "to": None if number == len(EDGES) else EDGES[number],
                            "rounds": int((bins == number).sum()),
                            "passed": round(float(passed[bins == number].mean()), 4)
                            if (bins == number).any()
                            else None,
                        }
                        for number in range(len(EDGES) + 1)
                    ],
                }
            )
            print(gate, num_sampled, rows[-1]["bins"])
    arguments.out.write_text(json.dumps({"rounds": arguments.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
