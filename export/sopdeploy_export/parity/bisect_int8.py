"""On failure in int8: which convolution is the first that the runtime's kernels compute otherwise.

What a convolution gives is read behind its DequantizeLinear where the graph rounds it to bytes, so that the
runtime still fuses what is before. The yardstick is what rounding itself does there: how far the graph,
operator by operator, is from the float32 graph.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sopdeploy_export.parity.bisect import PICTURES, Boundary, drift_at, run_file
from sopdeploy_export.parity.session import fixed_batch


def first_off_int8(
    path: Path, sound: onnx.ModelProto, plain: onnx.ModelProto, images: NDArray[np.uint8], floors: float
) -> str | None:
    """Say which convolution of the int8 file at *path* is the first off by over *floors*.

    *sound* is the int8 graph as it was made, *plain* the float32 graph it was made of.
    """
    places = convolution_values(sound)
    names, pixels = list(places), images[:PICTURES][: fixed_batch(sound)]
    found = run_file(onnx.load(path), names, pixels)
    own = run_file(sound, names, pixels, optimised=False)
    exact = run_file(plain, [place.value for place in places.values()], pixels)
    by_name = {name: exact[place.value].astype(np.float64) for name, place in places.items()}
    for name, place in places.items():
        drift = drift_at(Boundary(value=name, part=place.part), found, by_name, own)
        if drift is not None and drift.in_floors > floors:
            return (
                f"the first part over its floor is {place.part} ({drift.in_floors:.0f} floors); "
                f"this processor's int8 kernels compute it otherwise: try --keep-float {place.part}"
            )
    return None


def convolution_values(model: onnx.ModelProto) -> dict[str, Boundary]:
    """Return what is behind every int8 convolution of *model*, by the name of the value to read there."""
    dequantised = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    rounded = {
        node.input[0]: dequantised[node.output[0]].output[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] in dequantised
    }
    codes = {node.output[0]: name for name, node in dequantised.items()}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in codes:
            value = node.output[0]
            part = codes[node.input[1]].rpartition(".")[0]
            found[rounded.get(value, value)] = Boundary(value=value, part=part)
    return found
