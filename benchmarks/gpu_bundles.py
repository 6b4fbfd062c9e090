"""Write the bundles with which `make gpu-check` checks a GPU; needs torch, but no GPU.

    python benchmarks/gpu_bundles.py FOLDER [NAME-PRECISION ...]

The networks have random weights, which do not affect speed: three small ones, in fp32, fp16 and
int8, and at 224 pixels a ResNet-50 in fp16 and fp32, one with covariance pooling (iSQRT), and a
DSoP ResNet-18 without its branches. What exists is not written again; with names, only these
networks are.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import make_parser
from PIL import Image

from sopdeploy.bundle.manifest import Precision
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.weights.checkpoint import Checkpoint, write_checkpoint
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.options import ExportOptions

CLASSES = tuple(f"class {number}" for number in range(1000))
CALIBRATION = 64


class Case(NamedTuple):
    """A network, the precision of its bundle, the side of its images, its classes and its options."""

    name: str
    precision: Precision
    side: int
    labels: tuple[str, ...]
    config: dict[str, Any]


CASES = (
    Case("dsop-resnet8", "int8", 32, CLASSES[:10], {}),
    Case(
        "gsop-net2-preact-resnet164",
        "fp32",
        32,
        CLASSES[:10],
        {"blocks": 2, "cov_width": 32, "final_width": 32},
    ),
    Case(
        "gmsop-16-8-resnet18",
        "fp16",
        32,
        CLASSES[:10],
        {
            "components": 4,
            "chosen": 2,
            "blocks_per_stage": 1,
            "conv5_stride": 1,
            "component_widths": (6,),
        },
    ),
    Case("dsop-resnet18", "fp16", 224, CLASSES, {}),
    Case("isqrt-resnet50", "fp16", 224, CLASSES, {}),
    Case("resnet50", "fp32", 224, CLASSES, {}),
    Case("resnet50", "fp16", 224, CLASSES, {}),
)


def noise_image(seed: int, side: int) -> Image.Image:
    """Create an image of *side* x *side* pixels with smooth random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((side, side))


def export_case(case: Case, target: Path) -> None:
    """Export a network with random weights to *target*, detached if it has training-only modules."""
    torch.manual_seed(0)
    network = create_model(case.name, num_classes=len(case.labels), **case.config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{case.name}.pt")
        random = Checkpoint(
            model=case.name,
            config=network.config.model_dump(mode="json"),
            weights=network.state_dict(),
            labels=case.labels,
            preprocess=Preprocess(resize=case.side, crop=case.side, decoding="fast"),
            training={},
        )
        write_checkpoint(source, random)
        calibration = Path(folder, "images")
        calibration.mkdir()
        for number in range(CALIBRATION):
            noise_image(number, case.side).save(calibration / f"{number}.png")
        int8 = {"calibrate": calibration, "int8_for": "tensorrt", "max_drop": 100.0}
        options = ExportOptions(
            detach=bool(network.training_only),
            max_batch=64,
            precision=case.precision,
            allow_numerical_error=True,  # random weights
            **(int8 if case.precision == "int8" else {}),
        )
        export_checkpoint(source, target, options=options)


def main() -> None:
    """Write what is missing."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    cases = {f"{case.name}-{case.precision}": case for case in CASES}
    parser.add_argument(
        "names", nargs="*", choices=[[], *cases], metavar="NAME", help=", ".join(cases)
    )
    given = parser.parse_args()
    folder = given.folder
    for name in given.names or cases:
        case, target = cases[name], folder / name
        if not list(target.glob("*/manifest.json")):
            export_case(case, target)
            print(f"{target}: written", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
