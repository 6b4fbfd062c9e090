"""What each arm costs when it is deployed: parameters, multiply-adds, and time on one thread of ONNX Runtime."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from measure import interleaved, markdown
from torch.export import Dim

from gain.arms import ARMS, DEFAULT, TWICE, Arm
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model
from sopdeploy_export.capture.program import as_captured
from sopdeploy_export.lower.to_onnx import to_ir

CLASSES = 100
RUNS = 15  # of each network, alternately
# The default classifier on more positions: options of the network, and the side of the images
POSITIONS = {
    f"{DEFAULT}, last_stride=1": ({"last_stride": 1}, 224),
    f"{DEFAULT}, 320 pixels": ({}, 320),
    f"{DEFAULT}, 448 pixels": ({}, 448),
}


def cost_table() -> str:
    """Build the table of all arms, and of the default classifier on more positions."""
    subjects: dict[str, tuple[Arm, int]] = {
        name: (arm, 224) for name, arm in ARMS.items() if name != TWICE
    }
    for name, (options, side) in POSITIONS.items():
        arm = ARMS[DEFAULT]
        subjects[name] = (arm._replace(config={**arm.config, **options}), side)

    sides: list[Callable[[], Any]] = [
        partial(*_session(arm, side)) for arm, side in subjects.values()
    ]
    seconds = interleaved(sides, runs=RUNS, warmups=2, clock=process_time)
    medians = [1e3 * statistics.median(times) for times in seconds]
    rows = []
    for (name, (arm, side)), ms in zip(subjects.items(), medians, strict=True):
        counts = describe(
            arm.network, image_size=side, num_classes=CLASSES, **arm.config
        ).shipped
        row = [name, f"{counts.parameters / 1e6:.2f}", f"{counts.macs / 1e9:.3f}"]
        rows.append([*row, f"{ms:.1f}", f"{ms / medians[0]:.2f}"])
    head = ("deployed network", "parameters, M", "multiply-adds, G", "ms an image", "ratio")
    return markdown(head, rows)


def _session(arm: Arm, side: int) -> tuple[object, None, Mapping[str, object]]:
    """Convert the inference model of *arm* to ONNX; return what runs it on one image, for `partial`."""
    torch.manual_seed(0)
    network = create_model(arm.network, num_classes=CLASSES, **arm.config)
    inference = network.inference_model().eval() if network.training_only else network.eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad(), as_captured(inference):
        program = torch.export.export(
            inference, (images,), dynamic_shapes=({0: Dim("batch", min=1)},)
        )
    model = ir.to_proto(to_ir(program, ["images"], ["logits"]))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run, None, {"images": images[:1].numpy().astype(np.float32)}
