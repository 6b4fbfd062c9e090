"""On failure in int8: which convolution is the first that the runtime's kernels compute otherwise.

Boundaries are the values that the graph rounds to bytes, read behind their DequantizeLinear, so that the
runtime still fuses what is before. The yardstick of each is what rounding itself does there: how far the
graph, operator by operator, is from the float32 graph.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sopdeploy_export.parity.bisect import PICTURES, Boundary, drift_in_floors, run_file


def first_off_int8(
    path: Path, sound: onnx.ModelProto, plain: onnx.ModelProto, images: NDArray[np.uint8], floors: float
) -> str | None:
    """Say which convolution of the int8 file at *path* is the first off by over *floors*.

    *sound* is the int8 graph as it was made, *plain* the float32 graph it was made of.
    """
    places = rounded_values(sound)
    names, pixels = list(places), images[:PICTURES]
    found = run_file(onnx.load(path), names, pixels)
    own = run_file(sound, names, pixels, optimised=False)
    exact = run_file(plain, [place.value for place in places.values()], pixels)
    by_name = {name: exact[place.value].astype(np.float64) for name, place in places.items()}
    for name, place in places.items():
        drift = drift_in_floors(name, found, by_name, own)
        if drift is not None and drift > floors:
            return (
                f"the first part over its floor is {place.part} ({drift:.0f} floors); this processor's int8 "
                f"kernels compute it otherwise: try --keep-float {place.part}"
            )
    return None


def rounded_values(model: onnx.ModelProto) -> dict[str, Boundary]:
    """Return, by the name of the dequantised value, each value that *model* rounds to bytes.

    Its part is the last convolution that led to it; what is before the first one is left out.
    """
    weights = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    order: dict[str, int] = {}
    parts: list[str] = []
    rounded: dict[str, str] = {}
    found: dict[str, Boundary] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = weights.get(node.input[1], node.input[1]).removesuffix("_quantized")
            order[node.output[0]] = len(parts)
            parts.append(weight.rpartition(".")[0] or weight)
            continue
        before = [order[name] for name in node.input if name in order]
        if not before:
            continue
        order.update(dict.fromkeys(node.output, max(before)))
        if node.op_type == "QuantizeLinear":
            rounded[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            value = rounded[node.input[0]]
            found[node.output[0]] = Boundary(value=value, part=parts[max(before)])
    return found
