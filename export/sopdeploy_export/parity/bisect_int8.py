"""Measure the drift of an int8 file from float32, and find the first convolution over its noise floor.

The output of a quantized convolution is read after its DequantizeLinear node, so that the runtime still fuses
the operators before it. The noise floor is the effect of quantization itself: the difference between the int8
graph, run operator by operator, and the float32 graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch.export import ExportedProgram

from sopdeploy_export.graph import with_converter_names
from sopdeploy_export.parity.onnx_file import (
    IMAGES,
    PART_IMAGES,
    Drift,
    boundaries,
    finite_drifts,
    fixed_batch,
    measure_drift,
    run_file,
    select_parts,
)
from sopdeploy_export.parity.report import PartDrift

# name of a value in the int8 graph: (module, name in the float32 graph)
Places = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Graphs:
    """The quantized graph and the float32 graph that it was made from."""

    int8: onnx.ModelProto
    float32: onnx.ModelProto


def find_first_int8_drift(
    path: Path, graphs: Int8Graphs, images: NDArray[np.uint8], floors: float
) -> str | None:
    """Find the first convolution of the file at *path* that drifts by more than *floors* noise floors.

    Returns a sentence with the module and the option to try; None if no convolution drifts as much.
    """
    for drift in drifts(path, graphs, convolution_values(graphs.int8), images[:IMAGES]):
        if drift.in_floors > floors:
            return (
                f"the first module over its noise floor is {drift.part} ({drift.in_floors:.0f}x); the int8 "
                f"kernels of this processor give different results: try --keep-float {drift.part}"
            )
    return None


def part_drifts_int8(
    path: Path,
    graphs: Int8Graphs,
    program: ExportedProgram,
    outputs: Sequence[str],
    images: NDArray[np.uint8],
) -> tuple[PartDrift, ...]:
    """Measure the drift of the int8 file at *path* from float32 at the modules of *program*."""
    converted = with_converter_names(program, outputs)
    if converted is None:
        return ()
    dequantized = _dequantized_values(graphs.int8)
    places = {
        dequantized.get(place.value, place.value): (place.part, place.value)
        for place in select_parts(boundaries(converted, graphs.float32))
    }
    return finite_drifts(drifts(path, graphs, places, images[-PART_IMAGES:]))


def drifts(path: Path, graphs: Int8Graphs, places: Places, images: NDArray[np.uint8]) -> Iterator[Drift]:
    """Yield the drift of the file at *path* from the float32 graph, for every value in *places*."""
    names, images = list(places), images[: fixed_batch(graphs.int8)]
    found = run_file(onnx.load(path), names, images)
    own = run_file(graphs.int8, names, images, optimized=False)
    exact = run_file(graphs.float32, [value for _, value in places.values()], images)
    for name, (part, value) in places.items():
        yield measure_drift(part, found[name], exact[value].astype(np.float64), own[name])


def convolution_values(model: onnx.ModelProto) -> Places:
    """Map the output of every int8 convolution of *model* to its module and its name in the float32 graph."""
    dequantized = _dequantized_values(model)
    codes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in codes:
            value = node.output[0]
            found[dequantized.get(value, value)] = codes[node.input[1]].rpartition(".")[0], value
    return found


def _dequantized_values(model: onnx.ModelProto) -> dict[str, str]:
    # Map each quantized value to the output of the DequantizeLinear node that follows it.
    back = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.input[0]: back[node.output[0]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] in back
    }
