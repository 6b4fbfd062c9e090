"""Accuracy gain of second-order pooling on CIFAR-10 and photographs.

    python benchmarks/second_order_gain.py --cifar FOLDER --cache DIR [--lines FILE] [--json]
        [--images 5000] [--epochs 10 40] [--draws N] [--search-epochs 10] [--search-draws 5] [--report]
    python benchmarks/second_order_gain.py --photos NAME=FOLDER ... --confirm NAME --lines FILE
        [--epochs 4] [--draws 3] [--search-draws 1] [--per-class 25] [--side 128]

On CIFAR-10 (a folder of images, train/ and test/, one folder per class), controls are branches
with average pooling (DSoP's Table VII), and "equal time": the plain network, trained at least as
long as DSoP in processor seconds.

--photos fine-tunes EfficientNet-Lite0 by the recipes fine-tune-*, each set with --per-class
photographs of each class (`gain.photo_study`). All sets but those of --confirm choose the
learning rate of each arm together. --latency compares one image of --side pixels in the exported
networks.

CIFAR-10 and photographs have the number of epochs as an axis. The rate of each arm and length
is the best on --search-draws draws, which nothing else uses; a grid whose best rate is on its
edge becomes wider. A second table has main loss and accuracy of each branch.

Draws of the same seed are paired; intervals are 95 % intervals of the paired difference, which
know that draws share their test images, without correction for multiple comparisons. The last
epoch counts. One thread, processor seconds of the training alone, on photographs with its
preparation. --lines receives a line of JSON for each run; finished ones are not repeated, and all
studies have a draw before the next one starts.
"""

import argparse
import os
import sys
from pathlib import Path

from gain.cifar_study import cifar_branches
from gain.execution import Lines, add_options
from gain.photo_study import latencies, photo_studies, summary
from gain.report import run_and_report
from gain.study import Study
from gain.task import CifarConfig, write_arrays
from measure import existing, make_parser, one_line_errors, report


def named_folder(text: str) -> tuple[str, Path]:
    """Convert NAME=FOLDER, as `type` of an option."""
    name, _, folder = text.partition("=")
    return name, existing(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--cifar", type=existing, help="folder with CIFAR-10's images; needs --cache"
    )
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument(
        "--images", type=int, default=5000, help="of CIFAR-10, for training (5000)"
    )
    parser.add_argument(
        "--photos", type=named_folder, action="append", help="NAME=FOLDER; repeatable"
    )
    parser.add_argument(
        "--confirm", action="append", help="a set that chooses no rate; repeatable"
    )
    parser.add_argument(
        "--per-class", type=int, default=25, help="photographs for training (25)"
    )
    parser.add_argument("--side", type=int, default=128, help="of the images in pixels (128)")
    parser.add_argument(
        "--latency", action="store_true", help="time the exported networks of --photos only"
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    if not parsed.photos and (parsed.cifar is None or parsed.cache is None):
        parser.error("give --photos, or --cifar and --cache")
    names = {name for name, _ in parsed.photos or ()}
    confirming = {*(parsed.confirm or ())}
    if unknown := sorted(confirming - names):
        parser.error(f"--confirm {unknown[0]}: no such set; name one of --photos")
    if names and names == confirming:
        parser.error("--confirm: no other set chooses the rates; add one with --photos")
    return parsed


def studies(given: argparse.Namespace) -> list[Study]:
    """Choose the studies; decode images once."""
    if given.photos:
        return photo_studies(given)
    given.cache.mkdir(parents=True, exist_ok=True)
    arrays = given.cache.resolve() / "cifar10.npz"
    if not arrays.exists():
        write_arrays(given.cifar, arrays)
    task = CifarConfig(arrays=arrays, train=given.images)
    return [cifar_branches(task, given.draws or 10, epochs) for epochs in given.epochs or [10]]


def main(arguments: list[str]) -> int:
    """Run the studies and print them."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.latency:
        report(latencies(given), as_json=given.json)
        return 0
    chosen = run_and_report(studies(given), given)
    if given.photos and not given.json:
        print(summary(chosen, Lines(given.lines)))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
