"""Accuracy gain of second-order heads on photographs.

    python benchmarks/second_order_gain.py --photos NAME=FOLDER ... [--lines FILE]
        [--epochs 4] [--draws 3] [--per-class 25] [--side 128] [--report] [--latency] [--json]

It fine-tunes the last stages of EfficientNet-Lite0 by the recipes fine-tune-*, with the same
images and augmentation: for the same number of epochs, and for the CPU time in which average pooling
trains for twice as many. --latency compares one image of --side pixels in the exported networks.

Draws of the same seed are paired; intervals are 95 % intervals of the paired difference, which
know that draws share their test images, without correction for multiple comparisons. The last
epoch counts. One thread, processor seconds of the training with its preparation. --lines receives
a line of JSON for each run; finished ones are not repeated, and all sets have a draw before the
next one starts.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from time import process_time
from typing import Any

import torch
from gain.photos import PhotosConfig, recipe_of
from gain.runs import Line, Lines, Run, paired_gain
from lowering import session_of
from measure import Result, existing, make_parser, markdown, one_line_errors, report
from measure import compare as compare_times

from sopdeploy.models.registry import create_model

FROZEN, FROZEN_HEAD = "frozen, averages", "frozen, second-order statistics"
PLAIN = "average pooling"
ISQRT, GSOP, GMSOP, DSOP = "iSQRT-COV", "GSoP", "GM-SOP", "DSoP, detached"
# The recipes of second-order heads train the last stages; so does average pooling here.
TRAINED: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {
        "network": "photos",
        "config": {"start.learn": "last_stages", "procedure.kind": "loop"},
    },
    # Revision 2: recipes whose new layers change pretrained ones less, or learn faster than these.
    ISQRT: {"network": "fine-tune-isqrt", "revision": 2},
    GSOP: {"network": "fine-tune-gsop", "revision": 2},
    GMSOP: {"network": "fine-tune-gmsop", "revision": 2},
    DSOP: {"network": "fine-tune-dsop", "revision": 2},
}
LEARNING_RATE = 3e-3  # chosen for average pooling, GSoP and DSoP on flowers and fruit
# So many times the epochs take about the same CPU time.
EQUAL_TIME = {PLAIN: 2.0, ISQRT: 2.0, GSOP: 1.75, GMSOP: 1.5, DSOP: 1.25}
Finished = dict[str, dict[int, Line]]  # by arm and seed


def longer(arm: str) -> str:
    """Name *arm* with the training that takes as long as twice the epochs of average pooling."""
    return f"{arm}, equal time"


# With what an arm is compared.
OTHERS = (
    {FROZEN_HEAD: FROZEN}
    | {arm: PLAIN for arm in TRAINED if arm != PLAIN}
    | {longer(arm): longer(PLAIN) for arm in TRAINED if arm != PLAIN}
    | {longer(PLAIN): PLAIN}
)


def list_arms(epochs: int) -> dict[str, dict[str, Any]]:
    """List all classifiers, each with the fields of its `Run`; trained ones train for *epochs*."""
    arms: dict[str, dict[str, Any]] = {}
    for arm, head in ((FROZEN, "gap"), (FROZEN_HEAD, "gap+isqrt")):
        config = {"procedure.kind": "few_shot", "procedure.head": head}
        arms[arm] = {"network": "photos", "config": config, "epochs": 0, "learning_rate": 1e-2}

    for arm, values in TRAINED.items():
        arms[arm] = {**values, "epochs": epochs, "learning_rate": LEARNING_RATE}
    for arm in TRAINED:
        arms[longer(arm)] = {**arms[arm], "epochs": round(EQUAL_TIME[arm] * epochs)}
    return arms


def run_all(given: argparse.Namespace) -> dict[str, Finished]:
    """Run all arms on all sets, draw by draw; return the finished runs of each set."""
    lines = Lines(given.lines, may_run=not given.report)
    arms = list_arms(given.epochs)
    finished: dict[str, Finished] = {
        name: {arm: {} for arm in arms} for name, _ in given.photos
    }

    for seed in range(given.draws):
        for name, folder in given.photos:
            task = PhotosConfig(
                folder=folder.resolve(), per_class=given.per_class, side=given.side
            )
            for arm, values in arms.items():
                run = Run(task=task, seed=seed, **values)
                line = lines.find(name, arm, run)
                if line is not None:
                    finished[name][arm][seed] = line

    num_finished = sum(len(runs) for of_set in finished.values() for runs in of_set.values())
    num_all = len(given.photos) * len(arms) * given.draws
    if num_finished < num_all:
        print(f"{given.lines}: has {num_finished} of {num_all} runs", file=sys.stderr)
    return finished


def mean_accuracy(runs: Mapping[int, Line]) -> float:
    """Return the mean accuracy of *runs* in percent."""
    return statistics.fmean(line.accuracy for line in runs.values())


def build_table(finished: Mapping[str, Finished], arms: Mapping[str, Any]) -> str:
    """Build the table of all sets: mean accuracy, number of draws, and difference from another arm.

    Draws count that are finished for both. The time is relative to average pooling, as the mean of
    all draws.
    """
    rows = []
    for arm, values in arms.items():
        cells = []
        times: list[float] = []
        parameters = 0
        for runs in finished.values():
            ours = runs[arm]
            if not ours:
                cells.append("")
                continue
            parameters = next(iter(ours.values())).parameters
            cell = f"{mean_accuracy(ours):.1f} ({len(ours)})"

            other = runs[OTHERS[arm]] if arm in OTHERS else {}
            if common := sorted(ours.keys() & other.keys()):
                mean, half = paired_gain([ours[i] for i in common], [other[i] for i in common])
                cell += f", {mean:+.1f} +- {half:.1f}"
            cells.append(cell)

            plain = runs[PLAIN]
            if values["epochs"]:
                times += [
                    ours[i].seconds / plain[i].seconds for i in ours.keys() & plain.keys()
                ]

        if any(cells):
            time = f"{statistics.fmean(times):.2f}" if times else ""
            rows.append([arm, *cells, time, f"{parameters / 1e6:.2f}"])

    columns = ("classifier", *finished, "training time", "million parameters")
    return markdown(columns, rows)


def list_results(finished: Mapping[str, Finished]) -> list[Result]:
    """List the mean accuracy of each arm on each set, beside the arm that it is compared with."""
    return [
        Result(
            case=f"{name}: {arm}",
            against=OTHERS.get(arm, ""),
            ours=mean_accuracy(ours),
            other=mean_accuracy(runs[OTHERS[arm]]) if runs.get(OTHERS.get(arm, "")) else None,
            unit="% accuracy",
            runs=len(ours),
        )
        for name, runs in finished.items()
        for arm, ours in runs.items()
        if ours
    ]


def latencies(given: argparse.Namespace) -> list[Result]:
    """Compare the exported network of each arm with average pooling: one image, one thread of ONNX Runtime."""
    config = PhotosConfig(folder=Path("photos"), side=given.side)
    images = torch.rand(1, 3, given.side, given.side)
    sides = {}
    for arm, values in TRAINED.items():
        model = recipe_of(config, values["network"], values.get("config", {})).model
        torch.manual_seed(0)
        network = create_model(model.name, num_classes=10, **model.config).inference_model()
        session = session_of(network, (images.expand(2, -1, -1, -1),))
        pixels = {session.get_inputs()[0].name: images.numpy()}
        sides[arm] = lambda session=session, pixels=pixels: session.run(None, pixels)

    return [
        compare_times(arm, PLAIN, side, sides[PLAIN], runs=41, warmups=3, clock=process_time)
        for arm, side in sides.items()
        if arm != PLAIN
    ]


def named_folder(text: str) -> tuple[str, Path]:
    """Convert NAME=FOLDER, as `type` of an option."""
    name, _, folder = text.partition("=")
    return name, existing(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--photos", type=named_folder, action="append", required=True, help="NAME=FOLDER")
    add("--per-class", type=int, default=25, help="photographs for training (25)")
    add("--side", type=int, default=128, help="of the images in pixels (128)")
    add("--draws", type=int, default=3, help="number of draws, the seeds 0, 1 and so on (3)")
    add("--epochs", type=int, default=4, help="length of training (4)")
    add("--lines", type=Path, help="file with a line per finished run; those are not repeated")
    add("--report", action="store_true", help="print the finished draws, and run nothing")
    add("--latency", action="store_true", help="time the exported networks only")

    given = parser.parse_args(arguments)
    if given.report and given.lines is None:
        parser.error("--report prints the runs of a file; give it with --lines FILE")
    return given


def main(arguments: list[str]) -> int:
    """Run the study and print it."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.latency:
        report(latencies(given), as_json=given.json)
        return 0

    finished = run_all(given)
    if given.json:
        report(list_results(finished), as_json=True)
    else:
        print(build_table(finished, list_arms(given.epochs)))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
