"""Latency of a detached network, compared with the plain one.

Exports a DSoP ResNet-18 with --detach and the plain ResNet-18 (conv5_x stride 1) with the same weights,
checks that both files contain the same initializers, and times them alternately in ONNX Runtime (CPU). The
plain network against itself shows the accuracy of the measurement.

    python benchmarks/detached_latency.py [--quick] [--json]
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from time import process_time

import numpy as np
import onnx
import onnxruntime as ort
import torch
from measure import Result, compare, parse, report

from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint

CLASSES = tuple(f"class {number}" for number in range(1000))


def checkpoint(
    name: str,
    network: Classifier,
    folder: Path,
    side: int | None = None,
    labels: tuple[str, ...] = CLASSES,
) -> Path:
    """Write *network* as a checkpoint, for images of 224 pixels or *side*."""
    path = folder / f"{name}.pt"
    write_checkpoint(
        path,
        Checkpoint(
            model=name,
            config=network.config.model_dump(mode="json"),
            weights=network.state_dict(),
            labels=labels,
            preprocess=Preprocess() if side is None else Preprocess(resize=side, crop=side),
            training={},
        ),
    )
    return path


def initializers(path: Path) -> dict[str, bytes]:
    """Read the initializers of an ONNX file by name."""
    return {tensor.name: tensor.raw_data for tensor in onnx.load(path).graph.initializer}


def session(path: Path) -> ort.InferenceSession:
    """Open an ONNX file with one thread, which other load disturbs least."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(folder: Path, batches: tuple[int, ...], runs: int) -> list[Result]:
    """Export both networks into *folder* and time them."""
    torch.manual_seed(0)
    trained = create_model("dsop-resnet18")
    plain = create_model("resnet18", conv5_stride=1)
    plain.load_state_dict({name: trained.state_dict()[name] for name in plain.state_dict()})
    ours = checkpoint("dsop-resnet18", trained, folder)
    ours = export_checkpoint(ours, folder, options=ExportOptions(detach=True)).path
    other = export_checkpoint(checkpoint("resnet18", plain, folder), folder).path
    if initializers(ours / "model.onnx") != initializers(other / "model.onnx"):
        sys.exit("the detached file does not contain the initializers of the plain network")
    detached, plain_file = (session(path / "model.onnx") for path in (ours, other))
    cases = {"detached": detached, "plain again": plain_file}
    results = []
    for batch in batches:
        images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
        for case, side in cases.items():
            result = compare(
                f"{case}, batch {batch}",
                "plain ResNet-18",
                partial(side.run, None, {"images": images}),
                partial(plain_file.run, None, {"images": images}),
                runs=runs,
                warmups=3,
                clock=process_time,
            )
            results.append(result)
    return results


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), (1,) if arguments.quick else (1, 8), 31 if arguments.quick else 51)
    report(results, as_json=arguments.json, initializers="equal")


if __name__ == "__main__":
    main()
