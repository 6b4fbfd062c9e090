"""Does second order pay? Accuracy of second-order heads on folders of images, frozen and fine-tuned.

    python benchmarks/second_order_gain.py --weights FILE --data NAME=DIR ... --out FILE
        [--cache DIR] [--side 224] [--seeds 3] [--epochs 20] [--per-class 0] [--stage NAME ...]
        [--arms NAME ...] [--report] [--cost] [--tables FILE ...]

DIR has train/<class>/ and test/<class>/, FILE the ImageNet weights of timm's `tf_efficientnet_lite0`. All
arms read the maps of the same frozen early stages (cached in --cache) and start from their closed form.

frozen: the closed form, with all training images and with ten per class in three draws.
first order: the best of six classifiers of averages, and of averages and deviations of three maps. The
classifier and its constants are chosen by cross-validation.
rates: of each arm three learning rates on the first half of the classes of the first set.
tuned: the last stages and all heads are trained on the second half of the classes of every set, at the
rate that was chosen, for --epochs or until the validation loss has not fallen for four epochs. A fifth of
the training images is for validation. The early stages are frozen, and mirrored copies are the only
augmentation. The rates were chosen on the other classes of the first set.

probes: Moment Probing and its control are trained on frozen features, with rates and classes as above.

A line of --out is written after each run, and finished runs are not repeated. The first seed of all arms
and sets comes first. --report prints the tables of finished runs, and --tables FILE ... replaces them in
files. --cost adds a table of what the deployed networks cost. Intervals are 95 % intervals of the
difference, paired over test images and seeds. Beside each gain is the share of the test images that both
networks answer right, or both wrong; above 98 %, they are the same network, and there is no gain to speak
of. One thread; times are CPU seconds of the training.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gain.arms import ARMS, AVERAGES, EVEN, GMSOP, TWICE, Arm, build, start_from_closed_form
from gain.cost import cost_table
from gain.first_order import FIRST_ORDER
from gain.frozen import FROZEN, first_order_answers, frozen_answers
from gain.maps import ImageSet, Part, open_set
from gain.moment_probing import PROBES, probe
from gain.report import build_tables, update_file
from gain.runs import Case, Line, Lines, encode_bits
from gain.tune import predict, tune
from measure import existing, make_parser, one_line_errors
from numpy.typing import NDArray

from sopdeploy.base.seeds import derive_seed
from sopdeploy.models.registry import CatalogModel
from sopdeploy.training.start_weights import read_weights_file

NETWORK = CatalogModel(name="efficientnet-lite0")
RATES = (1e-3, 3e-3, 1e-2)
RATE_EPOCHS = 5
RATE_PER_CLASS = 10  # training images, for the choice of the rates
FEW = 10  # training images per class of the second frozen table
DRAWS = 3
PROBE_RATES = (1e-3, 3e-3)
PROBE_EPOCHS = 40
VALIDATION = 0.2  # of the training images of each class
SAME_RATE = {TWICE: AVERAGES, EVEN: GMSOP}  # arms that take the rate of another one
STAGES = ("frozen", "first order", "rates", "tuned", "probes")
Indices = NDArray[np.int64]


def main(arguments: list[str]) -> int:
    """Run what is missing, and print the tables."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    lines = Lines(given.out)
    names = [name for name, _ in given.data]
    if not given.report:
        weights = read_weights_file(NETWORK, given.weights).tensors
        trains = bool(
            {"rates", "tuned"} & {*given.stage}
        )  # mirrored copies are for training only
        sets = [
            open_set(name, folder, weights, given.side, given.cache, with_mirrored=trains)
            for name, folder in given.data
        ]
        if "frozen" in given.stage:
            for images in sets:
                run_frozen(lines, images, weights, given.side)
        if "first order" in given.stage:
            for images in sets:
                run_first_order(lines, images, weights, given.side)
        if "rates" in given.stage:
            run_rates(lines, sets[0], weights, given.side, given.arms)
        if "tuned" in given.stage:
            run_tuned(lines, sets, weights, given)
        if "probes" in given.stage:
            run_probes(lines, sets, weights, given)

    tables = build_tables(lines, names, given.side)
    if given.cost:
        tables.append(cost_table())
    print("\n\n".join(tables))
    for path in given.tables:
        update_file(path, tables)
    return 0


def run_frozen(lines: Lines, images: ImageSet, weights: Mapping[str, Any], side: int) -> None:
    """Fit all closed forms to *images*: with all training images, and with few of each class in some draws."""
    cases = [
        Case(stage="frozen", images=images.name, side=side, arm=arm, seed=seed, per_class=count)
        for count, draws in ((0, 1), (FEW, DRAWS))
        for seed in range(draws)
        for arm in FROZEN
    ]
    missing = [case for case in cases if lines.find(case) is None]
    if not missing:
        return

    draws = sorted({(case.per_class, case.seed) for case in missing})
    members = {
        draw: draw_per_class(images.train.targets, count, seed)
        for draw in draws
        for count, seed in [draw]
    }
    for draw, arm, right in frozen_answers(images, weights, members):
        count, seed = draw
        case = Case(
            stage="frozen", images=images.name, side=side, arm=arm, seed=seed, per_class=count
        )
        add(lines, case, right)


def run_first_order(
    lines: Lines, images: ImageSet, weights: Mapping[str, Any], side: int
) -> None:
    """Choose classifiers of first-order statistics of *images* by cross-validation."""
    cases = {
        arm: Case(stage="first order", images=images.name, side=side, arm=arm)
        for arm in FIRST_ORDER
    }
    if all(lines.find(case) is not None for case in cases.values()):
        return
    for arm, right in first_order_answers(images, weights):
        add(lines, cases[arm], right)


def run_rates(
    lines: Lines, images: ImageSet, weights: Mapping[str, Any], side: int, arms: Sequence[str]
) -> None:
    """Train each of *arms* at each of `RATES` on some images of the first half of the classes of *images*."""
    half = select_classes(images, np.arange(len(images.labels) // 2))
    for name in arms:
        arm = ARMS[name]
        if name in SAME_RATE:
            continue
        for rate in RATES:
            case = Case(
                stage="rates",
                images=images.name,
                side=side,
                arm=name,
                rate=rate,
                epochs=RATE_EPOCHS,
                per_class=RATE_PER_CLASS,
            )
            if lines.find(case) is None:
                train_and_add(lines, case, arm, half, weights)


def run_tuned(
    lines: Lines,
    sets: Sequence[ImageSet],
    weights: Mapping[str, Any],
    given: argparse.Namespace,
) -> None:
    """Train each of the given arms on the second half of the classes of all *sets*, seed by seed."""
    rates = chosen_rates(lines, sets[0].name, given.side)
    for seed in range(given.seeds):
        for images in (*sets[1:], sets[0]):  # first those on which nothing is chosen
            count = len(images.labels)
            half = select_classes(images, np.arange(count // 2, count))
            for name in given.arms:
                arm = ARMS[name]
                rate = rates.get(SAME_RATE.get(name, name))
                if rate is None:
                    continue
                case = Case(
                    stage="tuned",
                    images=images.name,
                    side=given.side,
                    arm=name,
                    seed=seed,
                    rate=rate,
                    epochs=arm.times * given.epochs,
                    per_class=given.per_class,
                )
                if lines.find(case) is None:
                    train_and_add(lines, case, arm, half, weights)


def run_probes(
    lines: Lines,
    sets: Sequence[ImageSet],
    weights: Mapping[str, Any],
    given: argparse.Namespace,
) -> None:
    """Train the probes at each rate on half of the classes of the first set, at the best on the other halves."""
    middle = len(sets[0].labels) // 2
    first = select_classes(sets[0], np.arange(middle))
    for arm in PROBES:
        for rate in PROBE_RATES:
            case = Case(
                stage="probe rates",
                images=first.name,
                side=given.side,
                arm=arm,
                rate=rate,
                epochs=PROBE_EPOCHS // 2,
            )
            if lines.find(case) is None:
                probe_and_add(lines, case, first, weights)

    for seed in range(given.seeds):
        for images in sets:
            count = len(images.labels)
            half = select_classes(images, np.arange(count // 2, count))
            for arm in PROBES:
                runs = lines.select("probe rates", first.name, arm, given.side)
                case = Case(
                    stage="probes",
                    images=images.name,
                    side=given.side,
                    arm=arm,
                    seed=seed,
                    rate=max(runs, key=lambda line: line.accuracy).rate,
                    epochs=PROBE_EPOCHS,
                )
                if lines.find(case) is None:
                    probe_and_add(lines, case, half, weights)


def probe_and_add(
    lines: Lines, case: Case, images: ImageSet, weights: Mapping[str, Any]
) -> None:
    """Train the probe of *case* on *images*, and add the outcome to *lines*."""
    everything = np.arange(len(images.train.targets))
    learned, validation = hold_out(images.train.targets, everything, case.seed)
    right, seconds = probe(case, images, weights, learned, validation)
    add(lines, case, right, seconds=seconds)


def chosen_rates(lines: Lines, images: str, side: int) -> dict[str, float]:
    """Choose for each arm the rate of the highest accuracy; an arm whose rates have not all run is left out."""
    rates = {}
    for arm in ARMS:
        runs = lines.select("rates", images, arm, side)
        if len(runs) == len(RATES):
            rates[arm] = max(runs, key=lambda line: line.accuracy).rate
    return rates


def train_and_add(
    lines: Lines, case: Case, arm: Arm, images: ImageSet, weights: Mapping[str, Any]
) -> None:
    """Train *arm* on *images* from its closed form, and add the outcome to *lines*."""
    members = draw_per_class(images.train.targets, case.per_class, case.seed)
    learned, validation = hold_out(images.train.targets, members, case.seed)
    network = build(arm, weights, len(images.labels), case.seed)
    start_from_closed_form(network, images.train, learned, case.seed)

    everything = np.arange(len(images.test.targets))
    start = (
        predict(network, images.test, everything).argmax(dim=1).numpy() == images.test.targets
    )
    tuned = tune(
        network,
        images.train,
        learned,
        validation,
        rate=case.rate,
        epochs=case.epochs,
        seed=case.seed,
    )
    right = (
        predict(network, images.test, everything).argmax(dim=1).numpy() == images.test.targets
    )
    add(
        lines,
        case,
        right,
        frozen_accuracy=round(100 * float(start.mean()), 3),
        frozen_right=encode_bits(start),
        losses=tuned.losses,
        seconds=tuned.seconds,
        branch=tuned.branch_accuracy,
    )


def add(lines: Lines, case: Case, right: NDArray[np.bool_], **values: Any) -> None:
    """Add the outcome of *case*, of which the test images *right* are right, and say so."""
    line = Line(
        **case.model_dump(),
        accuracy=round(100 * float(right.mean()), 3),
        right=encode_bits(right),
        count=len(right),
        date=datetime.now(UTC).date().isoformat(),
        **values,
    )
    lines.add(line)
    start = "" if line.frozen_accuracy is None else f" from {line.frozen_accuracy:.2f} %"
    print(
        f"{case.stage} {case.images} {case.arm} seed {case.seed} rate {case.rate:g}: "
        f"{line.accuracy:.2f} %{start}, {len(line.losses)} validations, {line.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def draw_per_class(targets: Indices, count: int, seed: int) -> Indices:
    """Draw *count* images of each class, all if it is 0; return their indices, sorted."""
    if not count:
        return np.arange(len(targets))
    random = np.random.default_rng(derive_seed(seed, "subset"))
    drawn = [
        random.permutation(np.flatnonzero(targets == k))[:count] for k in np.unique(targets)
    ]
    return np.sort(np.concatenate(drawn))


def hold_out(targets: Indices, members: Indices, seed: int) -> tuple[Indices, Indices]:
    """Divide *members* into those to learn from and a fifth of each class for validation, both sorted."""
    random = np.random.default_rng(derive_seed(seed, "validation"))
    held_out = []
    for label in np.unique(targets[members]):
        of_class = random.permutation(members[targets[members] == label])
        held_out.append(of_class[: max(1, round(VALIDATION * len(of_class)))])
    validation = np.sort(np.concatenate(held_out))
    return np.setdiff1d(members, validation), validation


def select_classes(images: ImageSet, classes: Indices) -> ImageSet:
    """Select the *classes* of *images*, and number them from 0."""

    def select(part: Part) -> Part:
        members = np.flatnonzero(np.isin(part.targets, classes))
        mirrored = None if part.mirrored is None else part.mirrored[members]
        targets = np.searchsorted(classes, part.targets[members])
        return Part(part.maps[members], mirrored, targets)

    labels = tuple(images.labels[index] for index in classes)
    return ImageSet(images.name, labels, select(images.train), select(images.test))


def named_folder(text: str) -> tuple[str, Path]:
    """Convert NAME=FOLDER, as `type` of an option."""
    name, _, folder = text.partition("=")
    return name, existing(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    add_option = parser.add_argument
    add_option("--weights", type=existing, help="ImageNet weights of tf_efficientnet_lite0")
    add_option("--data", type=named_folder, action="append", required=True, help="NAME=FOLDER")
    add_option("--out", type=Path, required=True, help="file with a line per finished run")
    add_option("--cache", type=Path, default=Path("build/maps"), help="folder of the maps")
    add_option("--side", type=int, default=224, help="of the images in pixels (224)")
    add_option("--seeds", type=int, default=3, help="number of seeds (3)")
    add_option("--epochs", type=int, default=20, help="at most so many (20)")
    add_option(
        "--per-class", type=int, default=0, help="training images to fine-tune on (0: all)"
    )
    add_option("--stage", choices=STAGES, nargs="+", default=STAGES, help="what to run (all)")
    add_option("--arms", choices=ARMS, nargs="+", default=[*ARMS], help="to train (all)")
    add_option(
        "--tables", type=existing, nargs="+", default=[], help="files to bring up to date"
    )
    add_option("--report", action="store_true", help="print the finished runs, and run nothing")
    add_option("--cost", action="store_true", help="also count and time deployed networks")
    given = parser.parse_args(arguments)
    if not given.report and given.weights is None:
        parser.error("--weights is missing; give the weights of tf_efficientnet_lite0")
    return given


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
