"""What each arm costs when it is deployed: parameters, multiply-adds, and time on one thread of ONNX Runtime."""

import statistics
from collections.abc import Callable
from functools import partial
from time import process_time

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
SIDES = (320, 448)  # pixels of larger images, of the default classifier


def cost_table() -> str:
    """Build the table of all arms for 224 pixels, and of the default classifier for larger images."""
    subjects: dict[str, tuple[Arm, int]] = {
        name: (arm, 224) for name, arm in ARMS.items() if name != TWICE
    }
    for side in SIDES:
        subjects[f"{DEFAULT}, {side} pixels"] = (ARMS[DEFAULT], side)

    sides = [_inference(arm, side) for arm, side in subjects.values()]
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


def _inference(arm: Arm, side: int) -> Callable[[], object]:
    """Convert the inference model of *arm* to ONNX; return what runs it on one image of *side* pixels."""
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
    return partial(session.run, None, {"images": images[:1].numpy()})
