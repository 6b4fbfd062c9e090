"""Rounding: how often a file changes the margin of a photograph by more than the bound of `export --json`.

Converts the network of a checkpoint as `sopdeploy export` does, and compares the margins of photographs in
ONNX Runtime with those of the network in float64.

    python benchmarks/rounding.py CHECKPOINT --data DIR [--precision fp16] [--count 100] [--json]
"""

import argparse
import copy

import numpy as np
import torch
from measure import Result, existing, make_parser, one_line_errors, report

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.datasets.layouts import open_any_images
from sopdeploy.images.formats import open_image
from sopdeploy.images.pixels import preprocess_image, to_rgb
from sopdeploy_export.float64 import InFloat64
from sopdeploy_export.graph import Deployed, capture_any_batch, evenly_spread, lower, output_names
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.parity.findings import LOGITS
from sopdeploy_export.parity.onnx_file import file_outputs, open_session
from sopdeploy_export.precision.convert import CapturedGraph, convert_precision
from sopdeploy_export.rounding import bound_margin


def main(arguments: argparse.Namespace) -> None:
    """Print the results for a checkpoint."""
    checkpoint, options = read_checkpoint(arguments.checkpoint), ExportOptions(precision=arguments.precision)
    network, rules = build_classifier(checkpoint, arguments.checkpoint).eval(), checkpoint.preprocess
    program = capture_any_batch(network, rules, options.batch)
    certified = CapturedGraph(network, program, lower(program, output_names(network)))
    converted = convert_precision(certified, rules, options)
    session, module = open_session(converted.model), converted.program.module()
    exact_network = copy.deepcopy(Deployed(network, rules)).double().eval()
    images, rows = open_any_images(arguments.data), []
    for index in evenly_spread(len(images), arguments.count):
        image = to_rgb(open_image(images.read(index)), rules)
        pixels = np.array(preprocess_image(image, rules)[None])
        with torch.no_grad(), InFloat64():
            exact = exact_network(torch.from_numpy(pixels))[0].numpy()[0]
        first, second = np.argsort(-exact)[:2]
        logits = file_outputs(session, pixels, 1)[LOGITS][0].astype(np.float64)
        margin = exact[first] - exact[second]
        rows.append(
            (abs(logits[first] - logits[second] - margin), bound_margin(module, torch.from_numpy(pixels))[1])
        )
    difference, bound = np.array(rows).T
    case = f"{checkpoint.model} in {arguments.precision}, {len(rows)} photographs"
    values = {
        "largest difference": (1e6 * difference.max(), "1e-6 logits"),
        "median difference": (1e6 * np.median(difference), "1e-6 logits"),
        "median bound": (1e6 * np.median(bound), "1e-6 logits"),
        "difference above the bound": (100 * (difference > bound).mean(), "%"),
        "difference above a quarter of it (root of the sum of squares)": (
            100 * (4 * difference > bound).mean(),
            "%",
        ),
        "largest ratio": ((difference / bound).max(), "of the bound"),
    }
    report(
        [
            Result(case=f"{case}: {name}", ours=float(f"{value:.3g}"), unit=unit, runs=1)
            for name, (value, unit) in values.items()
        ],
        as_json=arguments.json,
    )


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=existing, help="checkpoint of a run or an import")
    parser.add_argument("--data", type=existing, required=True, help="folder of photographs")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16-backbone"), default="fp32", help="precision of the file"
    )
    parser.add_argument("--count", type=int, default=100, help="number of photographs")
    with one_line_errors():
        main(parser.parse_args())
