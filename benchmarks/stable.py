"""Answers marked as stable: how many there are, and how many of them another decoder or runtime changes.

Computes the margins of photographs in all variants that an export measures here. Three of five photographs,
at most as many as an export uses, give the threshold; the others are marked and tested in all variants. This
is repeated with 200 random splits. Then one variant after the other is left out, all draws of noise together:
the threshold does not see it, the test does.

    python benchmarks/stable.py --data DIR BUNDLE [--every N] [--json]

--data holds photographs that the network was not trained on; near-duplicates are not removed.
"""

import argparse

import numpy as np
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.data.datasets.layouts import open_any_images
from sopdeploy_export.stability import MAX_PHOTOGRAPHS, compute_leads, fit_stability

SPLITS = 200


def measure(names: tuple[str, ...], leads: NDArray[np.float64], left_out: str) -> NDArray[np.float64]:
    """Mark a part of the photographs by a threshold that does not see *left_out*, a kind of variant or "".

    Returns, for each split, the threshold, the share of stable photographs, the share of these that get
    another class in a variant, and the share of all photographs that do.
    """
    kept = tuple(name for name in names if kind_of(name) != left_out)
    seen, random, rows = [True, *(name in kept for name in names)], np.random.default_rng(0), []
    for _ in range(SPLITS):
        order = random.permutation(len(leads))
        count = min(3 * len(leads) // 5, MAX_PHOTOGRAPHS)
        fitted, tested = order[:count], order[count:]
        threshold = fit_stability(kept, leads[fitted][:, seen], fitted=False).threshold
        if threshold is None:
            raise SystemExit(f"{len(fitted)} photographs are too few; give more")
        stable, flips = leads[tested, 0] > threshold, leads[tested].min(axis=1) < 0
        rows.append((threshold, stable.mean(), flips[stable].mean(), flips.mean()))
    return np.array(rows)


def kind_of(variant: str) -> str:
    """Return the name of a variant without the number of its draw."""
    return variant.partition(", draw")[0]


def results(names: tuple[str, ...], leads: NDArray[np.float64]) -> list[Result]:
    """Summarize the splits, with all variants and with each kind of them left out."""
    found = []
    for left_out in ("", *dict.fromkeys(map(kind_of, names))):
        rows = measure(names, leads, left_out)
        case = f"without {left_out}" if left_out else f"{len(leads)} photographs, {len(names)} variants"
        for name, value, unit in (
            ("threshold", rows[:, 0].mean(), "logits"),
            ("stable", 100 * rows[:, 1].mean(), "%"),
            ("stable, in nine of ten splits at least", 100 * np.quantile(rows[:, 1], 0.1), "%"),
            ("change", 100 * rows[:, 2].mean(), "% of stable"),
            ("change, in nine of ten splits at most", 100 * np.quantile(rows[:, 2], 0.9), "% of stable"),
            ("change without marks", 100 * rows[:, 3].mean(), "%"),
        ):
            found.append(Result(case=f"{case}: {name}", ours=round(float(value), 3), unit=unit, runs=SPLITS))
    return found


def main(arguments: argparse.Namespace) -> None:
    """Print the results for a bundle."""
    bundle, images = open_bundle(arguments.bundle), open_any_images(arguments.data)
    files = (images.read(index) for index in range(0, len(images), arguments.every))
    rules, batch = bundle.manifest.preprocess, bundle.manifest.batch.maximum
    report(results(*compute_leads(bundle.onnx, None, files, rules, batch)), as_json=arguments.json)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing, help="exported bundle")
    parser.add_argument("--data", type=existing, required=True, help="folder of photographs")
    parser.add_argument("--every", type=int, default=1, help="use every N-th photograph")
    with one_line_errors():
        main(parser.parse_args())
