"""Read the types of ONNX graphs, and cast uint8 images before all other operators.

TensorRT accepts uint8 only for network inputs, so the cast to a floating type must come first. This gives the
same result, because casts commute with operators that only move values, and keep the shape.
"""

import onnx
from onnx import TensorProto, helper

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


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer the element type of every value of *model*."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return types


def operator_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Map operator names to precisions, without operators that only move, convert or quantize values."""
    types = value_types(model)
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    precisions = {}
    for node in model.graph.node:
        if any(producers.get(name) == "DequantizeLinear" for name in node.input):
            precision = "int8" if node.op_type in PRODUCTS else ""
        elif node.op_type in COMPUTES_NOTHING:
            precision = ""
        else:
            precision = PRECISIONS.get(types.get(node.output[0], 0), "")
        if node.name and precision:
            precisions[node.name] = precision
    return precisions


def graph_precision(model: onnx.ModelProto) -> str:
    """Determine the precision of the graph: the lowest of its convolutions and matrix products."""
    products = {node.name for node in model.graph.node if node.op_type in PRODUCTS}
    used = {precision for name, precision in operator_precisions(model).items() if name in products}
    return next((precision for precision in ("int8", "bf16", "fp16") if precision in used), "fp32")


def cast_images_first(model: onnx.ModelProto) -> Hazard | None:
    """Cast uint8 images to float32 before the operators that move them or read their shape, in place.

    Later casts of *model* remain and do not change float32 values. Raises `LoweringError` if another operator
    reads uint8 values.
    """
    images = model.graph.input[0]
    if images.type.tensor_type.elem_type != TensorProto.UINT8:
        return None
    unsigned, before_cast = {images.name}, 0
    for node in model.graph.node:  # in topological order
        if unsigned.isdisjoint(node.input) or node.op_type == "Cast":
            continue
        if node.op_type not in MOVES | {"Shape"}:
            raise LoweringError(
                f"{images.name}: {node.op_type} uses unsigned bytes, which TensorRT can only cast"
            )
        unsigned.update(node.output if node.op_type in MOVES else ())
        before_cast += 1
    if not before_cast:
        return None
    cast = helper.make_node(
        "Cast", [images.name], [f"{images.name}_float32"], f"{images.name}_cast", to=TensorProto.FLOAT
    )
    for node in model.graph.node:
        node.input[:] = [cast.output[0] if name == images.name else name for name in node.input]
    model.graph.node.insert(0, cast)
    del model.graph.value_info[:]  # has the types of moved uint8 values
    return Hazard(
        rule="uint8-beyond-the-border",
        operators=before_cast,
        done="TensorRT accepts unsigned bytes only as an input: the cast now comes first",
    )
