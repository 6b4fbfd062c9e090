"""Labels that an order of kept photographs needs for the accuracy that a random order reaches with 200.

    python benchmarks/loop.py order --photos DIR --unknown DIR --weights FILE [--draws 6]

DIR of --photos has at least 70 photographs of each of ten classes, DIR/<class>/*.jpg. Each draw, whose seed
is its number, holds out 30 of each class for the test and trains on 10 of each class but one. The others are
the traffic: in a random sequence, with photographs of --unknown, which are 30 % of it, and the class that was
not trained on in its second half only. The network predicts the traffic once; an order has these predictions
only. Each label, also one of an unknown photograph, counts. Heads are those that `train` tries first,
refitted to all labels, on features that are computed once, with C = 100 instead of a cross-validated one.

The accuracy of the random order is a mean of six. Curves of accuracy, every 20 labels, are made monotone by
isotonic regression and interpolated. An order that does not reach the accuracy counts as 260 labels.
Intervals are Student's, over draws. The goal is at most 140 labels with the order of `label`.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import Result, one_line_errors
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from sopdeploy.api.options import TrainOptions
from sopdeploy.api.training import configure
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.datasets.folder import list_classes
from sopdeploy.data.datasets.layouts import open_any_images
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.decision import softmax
from sopdeploy.errors import DataError
from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.statistics import student
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.few_shot.candidates import Network, list_heads
from sopdeploy.training.few_shot.classifier import Problem, Targets
from sopdeploy.training.few_shot.config import FewShotConfig
from sopdeploy.training.start_weights import create_initial_model
from sopdeploy_service.labelling.folders import order_by_value

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Order = Callable[[Array, NDArray[np.bool_]], Indices]  # of probabilities (N, C), and whether they are known
STRENGTH, TESTED, STARTED = 100.0, 30, 10
BUDGET, STEP, LAST = 200, 20, 260
REPEATS = 6  # of the random order
UNKNOWN_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Photographs:
    """Vectors of N photographs, one array (N, D_i) per part of the head, and classes (N,); -1 is unknown."""

    parts: list[NDArray[np.float32]]
    targets: NDArray[np.int64]

    def classify(self, images: Indices) -> tuple[Array, Problem]:
        """Fit a head to *images*; return the logits (N, K) of all photographs, and the problem.

        The columns are the classes of *images* in ascending order.
        """
        labels, targets = np.unique(self.targets[images], return_inverse=True)
        chosen = ImageFiles(Path(), tuple(map(str, labels)), np.zeros(len(images), "S1"), targets)
        problem = Problem.create([part[images] for part in self.parts], Targets.of(chosen))
        head = problem.fit_all(STRENGTH)
        return np.concatenate(self.parts, axis=1) @ head.weight.T + head.bias, problem


def compute_features(photos: Path, unknown: Path, weights: Path) -> Photographs:
    """Compute the vectors of all photographs by the network that `train` starts from."""
    known, others = list_classes(photos).images, open_any_images(unknown)
    recipe = configure(photos, None, TrainOptions(weights=str(weights)), []).recipe
    model, recipe, _ = create_initial_model(recipe, known.labels, Strategy(select_device("cpu")))
    paths = [
        str(images.path(index).resolve()).encode()
        for images in (known, others)
        for index in range(len(images))
    ]
    targets = np.concatenate([known.targets.astype(np.int64), np.full(len(others), -1)])
    images: LabeledImages = ImageFiles(Path("/"), known.labels, np.asarray(paths), targets)
    network = Network(recipe, model, images, lambda _done, _total: None)
    head = list_heads(network.full, FewShotConfig())[0]
    return Photographs([network.vectors[:, part] for part in network.columns(head)], targets)


def draw(photographs: Photographs, seed: int) -> tuple[Indices, Indices, Indices]:
    """Draw the photographs to train on, the traffic in its sequence, and the test."""
    random, classes = np.random.default_rng(seed), int(photographs.targets.max()) + 1
    start, traffic, test = [], [], []
    for label in range(classes):
        images = random.permutation(np.flatnonzero(photographs.targets == label))
        begin = TESTED if label == seed % classes else TESTED + STARTED
        test += images[:TESTED].tolist()
        start += images[TESTED:begin].tolist()
        traffic += images[begin:].tolist()
    unknown = random.permutation(np.flatnonzero(photographs.targets < 0))
    count = round(len(traffic) * UNKNOWN_SHARE / (1 - UNKNOWN_SHARE))
    if len(unknown) < count:
        raise DataError(f"--unknown: {len(unknown)} photographs, {count} are needed; add some")
    sequence = random.permutation([*traffic, *unknown[:count].tolist()])
    early = np.arange(len(sequence)) < len(sequence) / 2
    kept = ~(early & (photographs.targets[sequence] == seed % classes))
    return np.asarray(start), sequence[kept], np.asarray(test)


def margins(probabilities_NC: Array) -> Array:
    """Compute the differences (N,) of the two largest probabilities."""
    ordered = np.sort(probabilities_NC, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def entropies(probabilities_NC: Array) -> Array:
    """Compute the entropies (N,) of probabilities."""
    sums: Array = (probabilities_NC * np.log(probabilities_NC + 1e-12)).sum(axis=1)
    return -sums


def farthest_first(points_NC: Array) -> Indices:
    """Order points by their distance from those before (k-center; Sener and Savarese, ICLR 2018)."""
    distances, order = np.ones(len(points_NC)), list[int]()
    for _ in range(min(LAST, len(points_NC))):
        order.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(points_NC - points_NC[order[-1]], axis=1))
        distances[order] = -1
    return np.asarray(order, np.intp)


def badge(probabilities_NC: Array) -> Indices:
    """Draw photographs by k-means++ on the gradients of their losses with respect to the logits.

    The loss is that of the most probable class (Ash et al., ICLR 2020, algorithm 1).
    """
    gradients, random, order = probabilities_NC.copy(), np.random.default_rng(0), list[int]()
    gradients[np.arange(len(gradients)), gradients.argmax(axis=1)] -= 1
    weights, nearest = np.square(gradients).sum(axis=1), np.full(len(gradients), np.inf)
    place = int(weights.argmax())
    while len(order) < min(LAST, len(gradients)):
        order.append(place)
        nearest = np.minimum(nearest, np.square(gradients - gradients[place]).sum(axis=1))
        weights = np.where(np.isin(np.arange(len(nearest)), order), 0, nearest + 1e-12)
        if weights.any():
            place = int(random.choice(len(weights), p=weights / weights.sum()))
    return np.asarray(order, np.intp)


def all_at_once(order: Callable[[Array], Indices]) -> Order:
    """Apply *order* to all photographs."""
    return lambda probabilities_NC, _known_N: order(probabilities_NC)


def known_first(order: Callable[[Array], Indices]) -> Order:
    """Apply *order* to the known photographs, and then to the others."""

    def ordered(probabilities_NC: Array, known_N: NDArray[np.bool_]) -> Indices:
        groups = [group for group in (np.flatnonzero(known_N), np.flatnonzero(~known_N)) if len(group)]
        return np.concatenate([group[order(probabilities_NC[group])] for group in groups])

    return ordered


LITERATURE: dict[str, Callable[[Array], Indices]] = {
    "random": lambda p: np.random.default_rng(0).permutation(len(p)),
    "margin": lambda p: margins(p).argsort(),
    "entropy": lambda p: (-entropies(p)).argsort(),
    "k-center": farthest_first,
    "BADGE": badge,
}
ORDERS: dict[str, Order] = {
    "label": order_by_value,
    **{name: all_at_once(order) for name, order in LITERATURE.items() if name != "random"},
    **{f"known first, {name}": known_first(order) for name, order in LITERATURE.items() if name != "entropy"},
}


def run_draw(photographs: Photographs, seed: int) -> dict[str, Array]:
    """Compute the accuracy after each `STEP` labels for all orders, in percent; "random" is a mean."""
    start, traffic, test = draw(photographs, seed)
    logits, problem = photographs.classify(start)
    targets = problem.targets.classes.argmax(axis=1)
    folds = problem.targets.folds([str(index) for index in start], 10, seed)
    out_of_fold = problem.cross_validate(folds, [STRENGTH])[0]
    rule = fit_decision(out_of_fold, targets, estimated_on="cross-validation", scalable=False).rejection
    if rule is None:
        raise DataError("--photos: too few classes for a threshold of unknown photographs; give ten")
    known = np.asarray([rule.recognize(row)[0] for row in logits[traffic]])

    def accuracies(order: Indices) -> Array:
        found = []
        for count in range(STEP, LAST + 1, STEP):
            labelled = traffic[order[:count]]
            images = np.concatenate([start, labelled[photographs.targets[labelled] >= 0]])
            best = photographs.classify(images)[0][test].argmax(axis=1)
            found.append(
                100 * (np.unique(photographs.targets[images])[best] == photographs.targets[test]).mean()
            )
        return np.asarray(found)

    random = [
        accuracies(np.random.default_rng(repeat).permutation(len(traffic))) for repeat in range(REPEATS)
    ]
    curves = {"random": np.mean(random, axis=0)}
    for name, order in ORDERS.items():
        curves[name] = accuracies(order(softmax(logits[traffic]), known))
    print(
        f"draw {seed}: { ({name: curve.round(1).tolist() for name, curve in curves.items()}) }",
        file=sys.stderr,
    )
    return curves


def labels_needed(curve: Array, accuracy: float) -> float:
    """Interpolate the number of labels with which the monotone *curve* reaches *accuracy*; at most `LAST`."""
    counts = np.arange(STEP, LAST + 1, STEP)
    monotone = IsotonicRegression().fit_transform(counts, curve)
    reached = int((monotone >= accuracy).argmax())
    if monotone[-1] < accuracy or reached == 0:
        return float(counts[reached] if monotone[-1] >= accuracy else LAST)
    share = (accuracy - monotone[reached - 1]) / (monotone[reached] - monotone[reached - 1])
    return float(counts[reached - 1] + STEP * share)


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Measure every order: labels for the accuracy of the random one, and accuracy; called by `loop.py`."""
    with one_line_errors():
        if not (arguments.photos and arguments.unknown and arguments.weights):
            raise DataError("order: needs --photos, --unknown and --weights")
        photographs = compute_features(arguments.photos, arguments.unknown, arguments.weights)
        draws = [run_draw(photographs, seed) for seed in range(arguments.draws)]
    results = []
    for name in draws[0]:
        needed = [labels_needed(curves[name], curves["random"][BUDGET // STEP - 1]) for curves in draws]
        interval = {"mean": float(np.mean(needed)), **student(needed)._asdict()}
        values = {
            f"labels for the accuracy of {BUDGET} random, {what}": (one, "labels")
            for what, one in interval.items()
        }
        for count in (BUDGET // 2, BUDGET):
            mean = float(np.mean([curves[name][count // STEP - 1] for curves in draws]))
            values[f"top-1 with {count} labels"] = (mean, "%")
        results += [
            Result(case=f"{name}: {case}", ours=value, unit=unit, runs=len(draws))
            for case, (value, unit) in values.items()
        ]
    return results
