"""Find the layers and parts that cost most in int8, by quantizing each alone.

Weights are rounded per output channel, which commutes with the batch norm after the convolution. Inputs are
rounded to the range that calibration found. A cost is the root mean square change of the logits over their
standard deviation.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from sopdeploy_export.graph.onnx_export import PREFIX
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.precision.report import Cost

MAX_LAYERS = 10  # in the report
IMAGES = 8


class Grid(NamedTuple):
    """Quantization grid of a tensor: scale, zero point and ends of its 8-bit type."""

    scale: float
    zero: int
    lowest: int
    highest: int

    def __call__(self, values: Tensor) -> Tensor:
        """Round *values* to the grid."""
        steps = torch.round(values / self.scale) + self.zero
        return (steps.clamp(self.lowest, self.highest) - self.zero) * self.scale


def input_grids(model: onnx.ModelProto) -> dict[str, Grid]:
    """Map the name of each quantized convolution to the grid of its input."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    grids = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[0] not in producers or node.input[1] not in producers:
            continue
        _, scale, zero = (constants.get(name) for name in producers[node.input[0]].input)
        if scale is None or zero is None:
            continue
        point = numpy_helper.to_array(zero)
        ends = np.iinfo(point.dtype)
        step = float(numpy_helper.to_array(scale).item())
        part = producers[node.input[1]].input[0].rpartition(".")[0]
        grids[part] = Grid(step, int(point.item()), int(ends.min), int(ends.max))
    return grids


def measure_sensitivity(
    deployed: Deployed, grids: Mapping[str, Grid], images: NDArray[np.uint8]
) -> tuple[tuple[Cost, ...], tuple[Cost, ...]]:
    """Measure the costs of the layers in *grids* and of the parts around them.

    A part is the shortest prefix of the layers' names that distinguishes several parts. Only the ten layers
    that cost most are returned.
    """
    parts: dict[str, list[str]] = {}
    for depth in range(1, max((layer.count(".") for layer in grids), default=0) + 2):
        parts = {}
        for layer in grids:
            parts.setdefault(".".join(layer.split(".")[:depth]), []).append(layer)
        if len(parts) > 1:
            break
    some = np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)
    pixels, network = torch.from_numpy(images[some]), copy.deepcopy(deployed)
    layers = _costs(network, pixels, grids, {layer: [layer] for layer in grids})
    return layers[:MAX_LAYERS], _costs(network, pixels, grids, parts)


@torch.no_grad()
def _costs(
    network: Deployed, pixels: Tensor, grids: Mapping[str, Grid], groups: Mapping[str, Sequence[str]]
) -> tuple[Cost, ...]:
    """Quantize the layers of each group together and measure the change of the logits."""
    plain = network(pixels)[0]
    spread = float(plain.std()) or 1.0
    modules = dict(network.named_modules())
    costs = []
    for name, layers in groups.items():
        convolutions = [(modules.get(PREFIX + layer), grids[layer]) for layer in layers]
        with ExitStack() as stack:
            found = False
            for convolution, grid in convolutions:
                if isinstance(convolution, nn.Conv2d):  # else the weights belong to another kind of part
                    stack.enter_context(_quantized(convolution, grid))
                    found = True
            if found:
                change = float((network(pixels)[0] - plain).square().mean().sqrt())
                costs.append(Cost(part=name, share=change / spread))
    return tuple(sorted(costs, key=lambda cost: -cost.share))


@contextmanager
def _quantized(convolution: nn.Conv2d, grid: Grid) -> Iterator[None]:
    """Quantize weights and input of *convolution* within the context."""
    original = convolution.weight.data
    dims = tuple(range(1, original.dim()))
    scale = original.abs().amax(dim=dims, keepdim=True).clamp_min(1e-12) / 127
    convolution.weight.data = torch.round(original / scale).clamp(-127, 127) * scale
    handle = convolution.register_forward_pre_hook(lambda _part, inputs: (grid(inputs[0]),))
    try:
        yield
    finally:
        handle.remove()
        convolution.weight.data = original
