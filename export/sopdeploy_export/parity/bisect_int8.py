"""Int8: how far each part is from the float32 graph, and which convolution the runtime computes otherwise.

What a convolution gives is read behind its DequantizeLinear where the graph rounds it to bytes, so that the
runtime still fuses what is before. The yardstick is what rounding itself does there: how far the graph,
operator by operator, is from the float32 graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch.export import ExportedProgram

from sopdeploy_export.graph.onnx_export import with_converter_names
from sopdeploy_export.parity.bisect import (
    PICTURES,
    PICTURES_OF_PARTS,
    Drift,
    boundaries,
    drift_at,
    finite,
    run_file,
    spread_over_depth,
)
from sopdeploy_export.parity.report import PartDrift
from sopdeploy_export.parity.session import fixed_batch

Places = Mapping[str, tuple[str, str]]  # by the value to read in int8, a part and its value in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Graphs:
    """The int8 graph as it was made, `sound`, and the float32 graph that it was made of, `plain`."""

    int8: onnx.ModelProto
    float32: onnx.ModelProto


def find_first_int8_drift(
    path: Path, graphs: Int8Graphs, images: NDArray[np.uint8], floors: float
) -> str | None:
    """Say which convolution of the int8 file at *path* is the first off by over *floors*."""
    for drift in drifts(path, graphs, convolution_values(graphs.int8), images[:PICTURES]):
        if drift.in_floors > floors:
            return (
                f"the first part over its floor is {drift.part} ({drift.in_floors:.0f} floors); "
                f"this processor's int8 kernels compute it otherwise: try --keep-float {drift.part}"
            )
    return None


def part_drifts_int8(
    path: Path,
    graphs: Int8Graphs,
    program: ExportedProgram,
    outputs: Sequence[str],
    images: NDArray[np.uint8],
) -> tuple[PartDrift, ...]:
    """Return how far the int8 file at *path* is from the float32 graph at the parts of *program*."""
    converted = with_converter_names(program, outputs)
    if converted is None:
        return ()
    places = spread_over_depth(boundaries(converted, graphs.float32))
    behind = rounded_values(graphs.int8)
    read = {behind.get(place.value, place.value): (place.part, place.value) for place in places}
    return finite(drifts(path, graphs, read, images[-PICTURES_OF_PARTS:]))


def drifts(path: Path, graphs: Int8Graphs, places: Places, images: NDArray[np.uint8]) -> Iterator[Drift]:
    """Give the drift of the file at *path* at *places*."""
    names, images = list(places), images[: fixed_batch(graphs.int8)]
    found = run_file(onnx.load(path), names, images)
    own = run_file(graphs.int8, names, images, optimized=False)
    exact = run_file(graphs.float32, [value for _, value in places.values()], images)
    for name, (part, value) in places.items():
        yield drift_at(part, found[name], exact[value].astype(np.float64), own[name])


def rounded_values(model: onnx.ModelProto) -> dict[str, str]:
    """Return of every value that *model* rounds to bytes what stands for it behind its DequantizeLinear."""
    back = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.input[0]: back[node.output[0]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] in back
    }


def convolution_values(model: onnx.ModelProto) -> Places:
    """Return the convolutions of *model* that are int8."""
    behind = rounded_values(model)
    codes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in codes:
            value = node.output[0]
            part = codes[node.input[1]].rpartition(".")[0]
            found[behind.get(value, value)] = part, value
    return found
