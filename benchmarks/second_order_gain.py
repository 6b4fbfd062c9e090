"""Accuracy gain of second-order pooling on generated textures, digits and CIFAR-10.

    python benchmarks/second_order_gain.py [--cifar FOLDER --cache DIR] [--study NAME] [--lines FILE] [--json]
        [--epochs 10 40] [--draws N] [--search-epochs 10] [--search-draws 5] [--report]

Generated textures differ in second moments only, so minimum results can be required: linear features with
average pooling are at chance, an iSQRT-COV head is at least 30 points above a two-layer network with
average pooling, the same network trained with DSoP branches (and detached) at least 15. Controls are branches
with average pooling (DSoP's Table VII), and the plain network trained as long as DSoP. Digits and CIFAR-10
(a folder of images, train/ and test/, one folder per class) have no required result.

"CIFAR-10 branches" has the number of epochs as an axis. The rate of each arm is the best on draws that are
not evaluated, and not on the edge of its grid. A second table has main loss and accuracy of each branch.

Runs with the same seed are paired; intervals are 95 % intervals of the paired difference, which know that
draws share their test images, without correction for multiple comparisons. The last epoch counts. One thread,
processor seconds of the training alone. Runs in --lines are not repeated.
Exit status 1: a required result was not reached.
"""

import argparse
import os
import sys
from pathlib import Path

from gain.execution import add_options
from gain.report import checks, run_and_report
from gain.small_image_studies import cifar_branches, digits, textures
from gain.study import Study
from gain.task import write_arrays
from measure import existing, make_parser, one_line_errors

NAMES = ("textures", "digits", "CIFAR-10 branches")


def studies(arrays: Path | None, given: argparse.Namespace) -> list[Study]:
    """Choose the studies; *arrays* is the file of CIFAR's images."""
    found = [textures(given.draws or 12), digits(given.draws or 24)]
    if arrays is not None:
        found += [cifar_branches(arrays, given.draws or 10, epochs) for epochs in given.epochs]
    return [one for one in found if one.name.partition(", ")[0] in (given.study or NAMES)]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--cifar", type=existing, help="folder with CIFAR-10's images; needs --cache")
    parser.add_argument("--cache", type=Path, help="folder for the decoded images; created if it is missing")
    parser.add_argument(
        "--study", action="append", choices=NAMES, help="run only this study; can be repeated"
    )
    add_options(parser, epochs=10)
    parsed = parser.parse_args(arguments)
    if parsed.cifar is not None and parsed.cache is None:
        parser.error("--cifar needs --cache, which stores the decoded images")
    return parsed


def decode_cifar(folder: Path | None, cache: Path | None) -> Path | None:
    """Decode CIFAR once; return the file of arrays."""
    if folder is None or cache is None:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    arrays = cache.resolve() / "cifar10.npz"
    if not arrays.exists():
        write_arrays(folder, arrays)
    return arrays


def main(arguments: list[str]) -> int:
    """Run the studies, print them, and return the exit status."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    arrays = decode_cifar(given.cifar, given.cache)
    chosen, results = run_and_report(studies(arrays, given), given)
    finished = [(study, results[study.name]) for study in chosen if results[study.name]]
    return 0 if all(is_reached for one in finished for _, is_reached in checks(*one)) else 1


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
