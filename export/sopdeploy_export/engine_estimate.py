"""How much GPU memory an engine will need, before there is one: weights, activations, borders.

Activations are counted as the largest sum of values that are alive at once when the operators run one by one
in the order of the graph. TensorRT fuses (less) and asks for workspace (more); so this is an estimate to
choose profiles by, and is printed as one.
"""

from collections.abc import Sequence
from math import prod

import onnx

from sopdeploy.engines.profiles import Profile
from sopdeploy.frozen import Frozen
from sopdeploy_export.engine_graph import constants

BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.DOUBLE: 8,
}


class ProfileMemory(Frozen):
    """Bytes that one profile needs at its largest batch."""

    batch: int
    activations: int
    borders: int


class MemoryEstimate(Frozen):
    """Bytes of weights, once, and of each profile; every profile's context holds its own activations."""

    weights: int
    profiles: tuple[ProfileMemory, ...]

    @property
    def total(self) -> int:
        """Return the bytes of a process that serves all profiles, workspace not counted."""
        borders = max(profile.borders for profile in self.profiles)
        return self.weights + borders + sum(profile.activations for profile in self.profiles)


def estimate(model: onnx.ModelProto, profiles: Sequence[Profile]) -> MemoryEstimate:
    """Return the memory that an engine of *model* with *profiles* will need, about."""
    weights = sum(prod(tensor.dims) * BYTES.get(tensor.data_type, 1) for tensor in constants(model).values())
    return MemoryEstimate(
        weights=weights,
        profiles=tuple(profile_memory(model, profile.maximum) for profile in profiles),
    )


def profile_memory(model: onnx.ModelProto, batch: int) -> ProfileMemory:
    """Return what *model* needs for *batch* images at once."""
    sizes = value_sizes(model, batch)
    border = [value.name for value in (*model.graph.input, *model.graph.output)]
    last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive, peak = 0, 0
    for index, node in enumerate(model.graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output if name not in border)
        peak = max(peak, alive)
        finished = {name for name in (*node.input, *node.output) if last_use.get(name, index) == index}
        alive -= sum(sizes.get(name, 0) for name in finished if name not in border)
    return ProfileMemory(batch=batch, activations=peak, borders=sum(sizes.get(name, 0) for name in border))


def value_sizes(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """Return the bytes of every computed value of *model* for *batch* images."""
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in fixed.graph.output:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    weights = constants(model)
    found = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
        if value.name not in weights:
            found[value.name] = prod(sizes) * BYTES.get(tensor.elem_type, 1)
    return found
