"""What the engine steps ask of an ONNX graph: constants, types, parts, precision. No torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.DOUBLE: "fp64",
}
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
COMPUTES_NOTHING = MOVES | {"Cast", "Constant", "DequantizeLinear", "QuantizeLinear"}
CENTRING = MOVES | {"Cast", "Div", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Sub"}
SECOND_ORDER = "second order"


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return every constant of *model* by name: initializers and the tensors of Constant nodes."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return the numbers of a constant."""
    values: NDArray[Any] = np.asarray(numpy_helper.to_array(tensor))
    return values


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value of *model* that can be inferred."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({name: tensor.data_type for name, tensor in constants(model).items()})
    return types


def operator_precision(node: onnx.NodeProto, types: Mapping[str, int], producers: Mapping[str, str]) -> str:
    """Return the precision that the graph asks of *node*; empty where it computes no floating numbers."""
    if any(producers.get(name) == "DequantizeLinear" for name in node.input):
        return "int8" if node.op_type in {"Conv", "MatMul", "Gemm"} else ""
    asked = PRECISIONS.get(types.get(node.output[0], 0), "")
    return "" if node.op_type in COMPUTES_NOTHING else asked


def asked_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Return by operator's name the precision that the graph asks of it."""
    types = value_types(model)
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    found = {node.name: operator_precision(node, types, producers) for node in model.graph.node if node.name}
    return {name: precision for name, precision in found.items() if precision}


def graph_precision(model: onnx.ModelProto) -> str:
    """Return the precision of the graph's heavy operators: the lowest that any of them is asked to have."""
    heavy = {"Conv", "MatMul", "Gemm"}
    names = {node.name for node in model.graph.node if node.op_type in heavy}
    asked = {precision for name, precision in asked_precisions(model).items() if name in names}
    return next((precision for precision in ("int8", "bf16", "fp16") if precision in asked), "fp32")


def parts(model: onnx.ModelProto) -> dict[str, str]:
    """Return by operator's name the part of the network it belongs to.

    An operator with weights belongs to the part that its weight's name begins with (`layer3`, `fc`). A
    product of two computed matrices, the centring that leads to it alone and what follows it, is the
    second-order part; anything else belongs to where its first operand was computed.
    """
    fixed = constants(model)
    weights = {name: name for name in fixed if "." in name}  # the others do not say where they come from
    part_of = {value.name: "input" for value in model.graph.input}
    found = {}
    for node in model.graph.node:
        own = [weights[name] for name in node.input if name in weights]
        computed = [name for name in node.input if name and name not in fixed and name not in weights]
        if own and node.op_type in {"Cast", "DequantizeLinear"}:  # of a weight is that weight
            weights[node.output[0]] = own[0]
        if own:
            part = own[0].partition(".")[0]
        elif node.op_type == "MatMul" and len(computed) == 2:
            part = SECOND_ORDER
        else:
            part = part_of.get(computed[0], "input") if computed else "constants"
        part_of.update(dict.fromkeys(node.output, part))
        found[node.output[0]] = part
    for node in reversed(model.graph.node):
        after = {found[user.output[0]] for user in model.graph.node if node.output[0] in user.input}
        if node.op_type in CENTRING and after == {SECOND_ORDER} and not weights.keys() & set(node.input):
            found[node.output[0]] = SECOND_ORDER
    return {node.name: found[node.output[0]] for node in model.graph.node if node.name}
