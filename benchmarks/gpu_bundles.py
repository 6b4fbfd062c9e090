"""Writes the bundles that `gpu_check.py` checks; needs torch, but no GPU.

    python benchmarks/gpu_bundles.py FOLDER [--carry]

The networks have random weights, which do not affect speed. FOLDER/NETWORK contains the checkpoint, and one
folder for each precision with its bundle. What exists is not written again. With --carry, the networks are
small ones of DSoP, iSQRT-COV, GSoP and EfficientNet, for machines to which only little can be copied, and a
ResNet-50 in fp16 without its checkpoint.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detached_latency import CLASSES, checkpoint
from measure import make_parser
from PIL import Image

from sopdeploy.bundle.manifest import Precision
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.models.registry import create_model
from sopdeploy_export.graph import generated_images
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


class Case(NamedTuple):
    """A network, the side of its images, its options and the precisions of its bundles."""

    name: str
    side: int
    config: dict[str, Any]
    precisions: tuple[Precision, ...] = PRECISIONS


LARGE = (
    Case("dsop-resnet50", 224, {}),
    Case("gsop-net2-resnet50", 224, {}),
    Case("gmsop-16-8-resnet18", 64, {}),
)
CARRIED = (
    Case("dsop-resnet8", 32, {}),
    Case("resnet8", 32, {"pooling": {"kind": "isqrt", "width": 8}}),
    Case("gsop-net2-preact-resnet164", 32, {"blocks": 2, "cov_width": 32, "final_width": 32}),
    Case(
        "gmsop-16-8-resnet18",
        32,
        {"components": 4, "chosen": 2, "blocks_per_stage": 1, "conv5_stride": 1, "component_widths": (6,)},
    ),
    Case("efficientnet-lite0", 64, {"width": 0.25, "depth": 0.25}),
)
RESNET50 = Case("resnet50", 224, {}, ("fp16",))


def make_checkpoint(case: Case, folder: Path) -> Path:
    """Write a checkpoint of the network of *case* with random weights; a small one has ten classes."""
    torch.manual_seed(0)
    labels = CLASSES[:10] if case in CARRIED else CLASSES
    network = create_model(case.name, num_classes=len(labels), **case.config)
    return checkpoint(case.name, network, folder, case.side, labels)


def make_bundle(source: Path, precision: Precision, folder: Path) -> Path:
    """Export *source* in *precision*, detached if it has training-only modules."""
    trained = read_checkpoint(source)
    network = build_classifier(trained, source)
    with tempfile.TemporaryDirectory() as calibration:
        for number, image in enumerate(generated_images(trained.preprocess.crop)):
            Image.fromarray(image).save(Path(calibration) / f"{number}.png")
        int8 = {"calibrate": Path(calibration), "int8_for": "tensorrt", "max_drop": 100.0}
        options = ExportOptions(
            detach=bool(network.training_only),
            max_batch=32,
            precision=precision,
            pt2=precision == "fp32",
            allow_drift=True,  # random weights
            **(int8 if precision == "int8" else {}),
        )
        return export_checkpoint(source, folder, options=options).path


def main() -> None:
    """Write what is missing."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--carry", action="store_true", help="small networks")
    options = parser.parse_args()
    for case in (*CARRIED, RESNET50) if options.carry else LARGE:
        target = options.folder / case.name
        target.mkdir(parents=True, exist_ok=True)
        source = target / f"{case.name}.pt"
        for precision in case.precisions:
            if list((target / precision).glob("*/manifest.json")):
                continue
            if not source.is_file():
                make_checkpoint(case, target)
            make_bundle(source, precision, target / precision)
            print(f"{case.name} {precision}: written", file=sys.stderr, flush=True)
        if case is RESNET50:
            source.unlink(missing_ok=True)  # too large to be carried


if __name__ == "__main__":
    main()
