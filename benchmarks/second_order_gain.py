"""Accuracy gain of second-order heads on photographs.

    python benchmarks/second_order_gain.py --photos NAME=FOLDER ... --confirm NAME --lines FILE
        [--epochs 4] [--draws 3] [--search-draws 1] [--per-class 25] [--side 128] [--report] [--json]

It fine-tunes EfficientNet-Lite0 by the recipes fine-tune-*, each set with --per-class photographs
of each class (`gain.photo_study`). All sets that --confirm does not name choose the learning rate of
each arm together. --latency compares one image of --side pixels in the exported networks.

The rate of each arm and length is the best on --search-draws draws, which nothing else uses; a
grid whose best rate is on its edge becomes wider.

Draws of the same seed are paired; intervals are 95 % intervals of the paired difference, which
know that draws share their test images, without correction for multiple comparisons. The last
epoch counts. One thread, processor seconds of the training with its preparation. --lines receives
a line of JSON for each run; finished ones are not repeated, and all studies have a draw before the
next one starts.
"""

import argparse
import os
import sys
from pathlib import Path

from gain.execution import Lines, add_options
from gain.photo_study import latencies, photo_studies, summary
from gain.report import run_and_report
from measure import existing, make_parser, one_line_errors, report


def named_folder(text: str) -> tuple[str, Path]:
    """Convert NAME=FOLDER, as `type` of an option."""
    name, _, folder = text.partition("=")
    return name, existing(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--photos",
        type=named_folder,
        action="append",
        required=True,
        help="NAME=FOLDER; repeatable",
    )
    parser.add_argument(
        "--confirm", action="append", help="a set that chooses no rate; repeatable"
    )
    parser.add_argument(
        "--per-class", type=int, default=25, help="photographs for training (25)"
    )
    parser.add_argument("--side", type=int, default=128, help="of the images in pixels (128)")
    parser.add_argument(
        "--latency", action="store_true", help="time the exported networks only"
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    names = {name for name, _ in parsed.photos}
    confirming = {*(parsed.confirm or ())}
    if unknown := sorted(confirming - names):
        parser.error(f"--confirm {unknown[0]}: no such set; name one of --photos")
    if names == confirming:
        parser.error("--confirm: no other set chooses the rates; add one with --photos")
    return parsed


def main(arguments: list[str]) -> int:
    """Run the studies and print them."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.latency:
        report(latencies(given), as_json=given.json)
        return 0
    chosen = run_and_report(photo_studies(given), given)
    if not given.json:
        print(summary(chosen, Lines(given.lines)))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
