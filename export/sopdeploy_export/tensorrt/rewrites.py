"""Read ONNX graphs, and cast uint8 inputs before all other operators.

TensorRT accepts uint8 only for network inputs, so the cast to a floating type must come first. This gives the
same result, because casts commute with operators that only move values, and keep the shape.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from sopdeploy.errors import LoweringError
from sopdeploy.tensorrt.record import Hazard

PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.DOUBLE: "fp64",
}
PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
COMPUTES_NOTHING = MOVES | {"Cast", "Constant", "DequantizeLinear", "QuantizeLinear"}


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Collect the constants of *model* by name: initializers and the tensors of Constant nodes."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Convert a constant to numpy."""
    values: NDArray[Any] = np.asarray(numpy_helper.to_array(tensor))
    return values


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer the element type of every value of *model*."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({name: tensor.data_type for name, tensor in constants(model).items()})
    return types


def operator_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Map operator names to precisions, without operators that only move, convert or quantize values."""
    types = value_types(model)
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        if any(producers.get(name) == "DequantizeLinear" for name in node.input):
            precision = "int8" if node.op_type in PRODUCTS else ""
        elif node.op_type in COMPUTES_NOTHING:
            precision = ""
        else:
            precision = PRECISIONS.get(types.get(node.output[0], 0), "")
        if node.name and precision:
            found[node.name] = precision
    return found


def graph_precision(model: onnx.ModelProto) -> str:
    """Determine the precision of the graph: the lowest of its convolutions and matrix products."""
    names = {node.name for node in model.graph.node if node.op_type in PRODUCTS}
    found = {precision for name, precision in operator_precisions(model).items() if name in names}
    return next((precision for precision in ("int8", "bf16", "fp16") if precision in found), "fp32")


def cast_bytes_first(model: onnx.ModelProto) -> Hazard | None:
    """Cast a uint8 input before the operators that move its values or read its shape, in place.

    Raises `LoweringError` if another operator reads uint8 values.
    """
    name = model.graph.input[0].name
    if model.graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return None
    graph, unsigned = model.graph, [name]
    passed: list[onnx.NodeProto] = []
    casts: list[onnx.NodeProto] = []
    for node in graph.node:  # in topological order
        if not set(unsigned) & set(node.input):
            continue
        if node.op_type == "Cast":
            casts.append(node)
        elif node.op_type in MOVES | {"Shape"} and node.input[0] in unsigned:
            passed.append(node)
            unsigned.extend(node.output if node.op_type in MOVES else ())
        else:
            raise LoweringError(f"{name}: {node.op_type} uses unsigned bytes, which TensorRT can only cast")
    borders = {value.name for value in graph.output}
    targets = {cast.attribute[0].i for cast in casts}
    if borders & {*unsigned, *(cast.output[0] for cast in casts)} or len(targets) != 1:
        raise LoweringError(f"{name}: is not cast to one floating type, so TensorRT cannot read its bytes")
    if not passed:
        return None
    widened = f"{name}_widened"
    renamed = {cast.output[0]: cast.input[0] for cast in casts}
    first = onnx.NodeProto.FromString(casts[0].SerializeToString())
    first.output[0], first.input[0] = widened, name
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node if node not in casts]
    for node in nodes:
        values = [renamed.get(value, value) for value in node.input]
        node.input[:] = [widened if value == name else value for value in values]
    position = next(index for index, node in enumerate(nodes) if widened in node.input)
    described = [value for value in graph.value_info if value.name not in {*unsigned, *renamed}]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in described]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*nodes[:position], first, *nodes[position:]])
    graph.value_info.extend(copies)
    return Hazard(
        rule="uint8-beyond-the-border",
        operators=len(passed),
        done="TensorRT accepts unsigned bytes only as an input: the cast now comes first",
    )
