"""Capture a network as one torch.export program with a symbolic batch size.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and returns
float32 outputs. torch.export specializes on what the Python code assumes about the batch size. A program
that does not support the whole requested range is rejected.
"""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.normalize import Normalize


class Deployed(nn.Module):
    """Normalization followed by *network*: the module that is captured and exported."""

    def __init__(self, network: Backbone, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalize(preprocess)
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of (B, H, W, 3) uint8 *images*, in float32 or float64."""
        return tuple(at_least_float32(value) for value in self.network.outputs_tuple(self.normalise(images)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """The programs of one network: for the whole batch range and for a batch of one."""

    any_batch: ExportedProgram
    batch_of_one: ExportedProgram


def capture(network: Backbone, preprocess: Preprocess, batch: BatchRange) -> Captured:
    """Capture *network*, in eval mode, for the batch range and for a batch of one.

    torch.export assumes that a dynamic dimension is at least 2, so only the second program shows code that
    handles a single image differently. Raises `LoweringError` if the network cannot be captured.
    """
    any_batch = capture_any_batch(network, preprocess, batch)
    if batch.maximum == 1:
        return Captured(any_batch=any_batch, batch_of_one=any_batch)
    single = BatchRange(optimum=1, maximum=1)
    return Captured(any_batch=any_batch, batch_of_one=capture_any_batch(network, preprocess, single))


def capture_any_batch(network: Backbone, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Capture *network* for every batch size of the range.

    Raises `LoweringError` if the network cannot be captured, or if its code restricts the batch size further.
    """
    deployed = Deployed(network, preprocess).eval()
    size = min(2, batch.maximum)
    images = torch.zeros(size, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    if size == 1:
        return export(deployed, (images,), None)
    program = export(deployed, (images,), ({0: Dim("batch", min=1, max=batch.maximum)},))
    name = program.graph_signature.user_inputs[0]
    dimension = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(
            f"the network fixes the batch size to {dimension}; it must accept any size from 1"
        )
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; its code depends on the batch size"
        )
    return program


def export(module: nn.Module, examples: tuple[Tensor, ...], dynamic_shapes: Any) -> ExportedProgram:
    """Run torch.export on *module* and make the program functional.

    Raises `LoweringError` with the first line of torch's message.
    """
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # torch prints part of the graph on failure
            program = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes)
            functional: ExportedProgram = program.run_decompositions({})
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise LoweringError(f"cannot be captured as one graph: {reason}") from error
    return functional
