"""Capture: the network as one graph, normalisation inside, for any batch size of a range.

The graph takes uint8 images (batch, height, width, 3), as `Preprocess` makes them, and gives float32
logits. torch.export traces one path through the Python code; whatever it had to assume about the batch
size beyond the range asked for is an error here, not a surprise later.
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
    """What is captured: uint8 images in, the network's `outputs` out."""

    def __init__(self, network: Backbone, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalize(preprocess)
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the network's answer to (B, H, W, 3) uint8 *images*, in float32 at least."""
        return tuple(at_least_float32(value) for value in self.network.outputs_tuple(self.normalise(images)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """A network's graphs: for every batch size of the range, and for a batch of exactly one."""

    any_batch: ExportedProgram
    batch_of_one: ExportedProgram


def capture(network: Backbone, preprocess: Preprocess, batch: BatchRange) -> Captured:
    """Return the graphs of *network*, which must be in eval mode.

    torch.export takes a dynamic dimension to be at least 2, so code that treats a single image otherwise
    shows only in the second graph. Raises `LoweringError` where the network cannot be captured.
    """
    any_batch = capture_any_batch(network, preprocess, batch)
    if batch.maximum == 1:
        return Captured(any_batch=any_batch, batch_of_one=any_batch)
    deployed = Deployed(network, preprocess).eval()
    return Captured(any_batch=any_batch, batch_of_one=export(deployed, (blank(1, preprocess),), None))


def capture_any_batch(network: Backbone, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Return the graph of *network* for every batch size of the range."""
    deployed = Deployed(network, preprocess).eval()
    if batch.maximum == 1:
        return export(deployed, (blank(1, preprocess),), None)
    pair = (blank(2, preprocess),)
    dynamic = export(deployed, pair, ({0: Dim("batch", min=1, max=batch.maximum)},))
    check_range(dynamic, batch)
    return dynamic


def blank(images: int, preprocess: Preprocess) -> Tensor:
    """Return black images of the size that the network takes."""
    return torch.zeros(images, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)


def export(deployed: nn.Module, examples: tuple[Tensor, ...], dynamic_shapes: Any) -> ExportedProgram:
    """Return the functional graph of *deployed*: writes through views become values."""
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # torch prints half a graph where it fails
            program = torch.export.export(deployed, examples, dynamic_shapes=dynamic_shapes)
            functional: ExportedProgram = program.run_decompositions({})
    except Exception as problem:  # torch.export raises whatever the traced code or its solver raises
        raise LoweringError(f"cannot be captured as one graph: {first_line(problem)}") from problem
    return functional


def first_line(problem: BaseException) -> str:
    """Return the first line of what *problem* says."""
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)


def check_range(program: ExportedProgram, batch: BatchRange) -> None:
    """Refuse a graph whose batch size was narrowed or fixed while it was captured."""
    size = program.graph_signature.user_inputs
    placeholder = next(node for node in program.graph.nodes if node.name == size[0])
    dimension = placeholder.meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(f"the network fixes the batch size to {dimension}; it must take any from 1 on")
    allowed = program.range_constraints[dimension.node.expr]
    if not (int(allowed.lower) <= 1 and int(allowed.upper) == batch.maximum):
        raise LoweringError(
            f"the network takes batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; it treats some batch sizes otherwise"
        )
