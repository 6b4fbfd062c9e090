"""Which quantised layers and parts cost most: each is quantised alone, in torch, and the logits are watched.

Weights are rounded per output channel, which commutes with the batch norm behind; inputs to the range that
calibration found. A cost is the root mean square change of the logits over their standard deviation.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.precision.report import Cost

SHOWN = 10
PICTURES = 8
PREFIX = "network."


class Grid(NamedTuple):
    """Step, zero point and ends of a tensor in bytes, signed or not."""

    scale: float
    zero: int
    lowest: int
    highest: int

    def __call__(self, values: Tensor) -> Tensor:
        """Return *values* rounded to the grid."""
        steps = torch.round(values / self.scale) + self.zero
        return (steps.clamp(self.lowest, self.highest) - self.zero) * self.scale


def input_grids(model: onnx.ModelProto) -> dict[str, Grid]:
    """Return the grid of the input of every quantised convolution of *model*, by the part's name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    grids = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] in made and node.input[1] in made:
            _, scale, zero = (constants.get(name) for name in made[node.input[0]].input)
            weight = made[node.input[1]].input[0]
            if scale is not None and zero is not None:
                grids[weight.rpartition(".")[0]] = grid_of(scale, zero)
    return grids


def grid_of(scale: onnx.TensorProto, zero: onnx.TensorProto) -> Grid:
    """Return the grid with the step *scale*, of the type and with the value of *zero*."""
    point = numpy_helper.to_array(zero)
    ends = np.iinfo(point.dtype)
    return Grid(float(numpy_helper.to_array(scale).item()), int(point.item()), int(ends.min), int(ends.max))


def rounded_weights(weight: Tensor) -> Tensor:
    """Return *weight* (out, ...) rounded to int8, each output channel by its own scale."""
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp_min(1e-12) / 127
    return torch.round(weight / scale).clamp(-127, 127) * scale


def convolution_of(deployed: Deployed, part: str) -> nn.Conv2d | None:
    """Return the convolution called *part*; None where its weights lie in a part of another kind."""
    found = dict(deployed.named_modules()).get(PREFIX + part)
    return found if isinstance(found, nn.Conv2d) else None


def quantise_in_place(convolution: nn.Conv2d, grid: Grid) -> Callable[[], None]:
    """Round weights and inputs of *convolution*; return what undoes it."""
    original = convolution.weight.data
    convolution.weight.data = rounded_weights(original)

    def on_grid(_part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (grid(inputs[0]),)

    handle = convolution.register_forward_pre_hook(on_grid)

    def undo() -> None:
        handle.remove()
        convolution.weight.data = original

    return undo


class Trial:
    """A copy of a network, *grids* for the inputs of its layers, some pictures and its answers to them."""

    @torch.no_grad()
    def __init__(self, deployed: Deployed, grids: Mapping[str, Grid], images: NDArray[np.uint8]) -> None:
        some = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).astype(int)
        self._pixels = torch.from_numpy(images[some])
        self._network = copy.deepcopy(deployed)
        self._plain = self._network(self._pixels)[0]
        self._grids = grids

    def layers(self) -> tuple[Cost, ...]:
        """Return the most expensive of the layers, the dearest first."""
        return self._costs({layer: [layer] for layer in self._grids})[:SHOWN]

    def parts(self) -> tuple[Cost, ...]:
        """Return what each part of the network costs, all its layers together, the dearest first."""
        return self._costs(by_part(list(self._grids)))

    @torch.no_grad()
    def _costs(self, groups: Mapping[str, Sequence[str]]) -> tuple[Cost, ...]:
        """Return what each of *groups* costs, its layers quantised together and no others."""
        spread = float(self._plain.std()) or 1.0
        found = []
        for name, layers in groups.items():
            convolutions = {layer: convolution_of(self._network, layer) for layer in layers}
            undo = [
                quantise_in_place(one, self._grids[layer])
                for layer, one in convolutions.items()
                if one is not None
            ]
            if undo:
                change = float((self._network(self._pixels)[0] - self._plain).square().mean().sqrt())
                found.append(Cost(part=name, share=change / spread))
            for restore in undo:
                restore()
        return tuple(sorted(found, key=lambda cost: -cost.share))


def by_part(layers: Sequence[str]) -> dict[str, list[str]]:
    """Return *layers* by the part that they stand in: by as much of their names as tells several apart."""
    found: dict[str, list[str]] = {}
    for depth in range(1, max((layer.count(".") for layer in layers), default=0) + 2):
        found = {}
        for layer in layers:
            found.setdefault(".".join(layer.split(".")[:depth]), []).append(layer)
        if len(found) > 1:
            break
    return found
