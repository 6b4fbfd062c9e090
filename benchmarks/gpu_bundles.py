"""Writes the bundles that `gpu_check.py` checks; needs torch, but no GPU.

    python benchmarks/gpu_bundles.py FOLDER

The networks have random weights, which do not affect speed. FOLDER/NETWORK contains the checkpoint, and one
folder for each precision with its bundle. What exists is not written again.
"""

import sys
from pathlib import Path

import torch
from detached_latency import CLASSES, checkpoint
from measure import make_parser

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.models.registry import create_model
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint

SIDES = {"dsop-resnet50": 224, "gsop-net2-resnet50": 224, "gmsop-16-8-resnet18": 64}
PRECISIONS = ("fp32", "fp16")


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a checkpoint of the network *name* with random weights."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=len(CLASSES))
    return checkpoint(name, network, folder, SIDES[name])


def make_bundle(source: Path, precision: str, folder: Path) -> Path:
    """Export *source* in *precision*, detached if it has training-only modules."""
    network = build_classifier(read_checkpoint(source), source)
    options = ExportOptions(
        detach=bool(network.training_only), max_batch=32, precision=precision, pt2=precision == "fp32"
    )
    return export_checkpoint(source, folder, options).path


def main() -> None:
    """Write what is missing."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in SIDES:
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        source = target / f"{name}.pt"
        if not source.is_file():
            make_checkpoint(name, target)
        for precision in PRECISIONS:
            if not list((target / precision).glob("*/manifest.json")):
                make_bundle(source, precision, target / precision)
                print(f"{name} {precision}: written", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
