"""The parts of `gpu_check.py` that need torch: bundles with random weights, and torch's speed.

The weights do not affect the speed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detached_latency import CLASSES, checkpoint
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.models.registry import create_model
from sopdeploy_export.graph import Deployed
from sopdeploy_export.pipeline import ExportOptions, export
from sopdeploy_export.proof.networks import detach

SIDES = {"dsop-resnet50": 224, "gsop-net2-resnet50": 224, "gmsop-16-8-resnet18": 64}
Run = Callable[[NDArray[np.uint8]], Any]


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a checkpoint of the network *name* with random weights."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=len(CLASSES))
    return checkpoint(name, network, folder, SIDES[name])


def make_bundle(source: Path, precision: str, folder: Path) -> Path:
    """Export *source* in *precision*, detached if it has training-only modules."""
    network = build_classifier(read_checkpoint(source), source)
    wanted = {} if precision == "fp32" else {"precision": {"precision": precision}}
    batch = BatchRange(minimum=1, optimum=8, maximum=32)
    options = ExportOptions(detach=bool(network.training_only), batch=batch, **wanted)
    return export(source, folder / precision, options).path


def torch_sides(path: Path, precision: str) -> dict[str, Run]:
    """Create functions that run torch on the GPU, eager and compiled, with inputs and outputs on the host."""
    trained = read_checkpoint(path)
    network = build_classifier(trained, path)
    detached = detach(network) if network.training_only else network
    deployed = Deployed(detached, trained.preprocess).eval().cuda()

    def side(model: Any) -> Run:
        def run(images: NDArray[np.uint8]) -> Any:
            with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=precision == "fp16"):
                return [output.cpu() for output in model(torch.from_numpy(images).cuda())]

        return run

    return {"torch eager": side(deployed), "torch.compile": side(torch.compile(deployed, dynamic=False))}
