"""Rewrite an ONNX graph into an equal one that TensorRT reads, or say why TensorRT would misread it.

TensorRT's own parser names the operators that it does not support. The lint covers what depends on the form
of bundles: bytes as input, and int8 graphs for CPUs.
"""

import onnx
from onnx import TensorProto, helper, numpy_helper

from sopdeploy.errors import LoweringError

MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def lint(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *model* in a form that TensorRT reads correctly.

    Raises `LoweringError` if TensorRT would reject or misread the graph.
    """
    safe = onnx.ModelProto()
    safe.CopyFrom(model)
    _check_quantization(safe)
    _cast_images_first(safe)
    return safe


def _check_quantization(model: onnx.ModelProto) -> None:
    """Reject quantization other than int8 with zero point 0.

    CPUs prefer uint8, a zero point and int32 biases. TensorRT's parser fails on a zero point or an int32
    bias, and reads uint8 as int8.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    types = _value_types(model)
    for node in model.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        codes = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
        symmetric = types.get(codes) == TensorProto.INT8
        if len(node.input) > 2 and node.input[2]:
            zero_point = constants.get(node.input[2])
            symmetric = symmetric and zero_point is not None and not numpy_helper.to_array(zero_point).any()
        if not symmetric:
            raise LoweringError(
                f"{node.name}: is quantized for CPUs, but TensorRT needs int8 with zero point 0: export "
                "again with --precision int8 --int8-for tensorrt"
            )


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer the element type of every value of *model*."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return types


def _cast_images_first(model: onnx.ModelProto) -> None:
    """Cast uint8 images to float32 before the operators that move them or read their shape, in place.

    TensorRT accepts uint8 only for network inputs, so the cast must come first. The result is the same,
    because casts commute with operators that only move values, and keep the shape. Later casts of *model*
    remain and do not change float32 values. Raises `LoweringError` if another operator reads uint8 values.
    """
    images = model.graph.input[0]
    if images.type.tensor_type.elem_type != TensorProto.UINT8:
        return
    unsigned, is_moved = {images.name}, False
    for node in model.graph.node:  # in topological order
        if unsigned.isdisjoint(node.input) or node.op_type == "Cast":
            continue
        if node.op_type not in MOVES | {"Shape"}:
            raise LoweringError(
                f"{images.name}: {node.op_type} uses unsigned bytes, which TensorRT can only cast"
            )
        unsigned.update(node.output if node.op_type in MOVES else ())
        is_moved = True
    if not is_moved:
        return
    cast = helper.make_node(
        "Cast", [images.name], [f"{images.name}_float32"], f"{images.name}_cast", to=TensorProto.FLOAT
    )
    for node in model.graph.node:
        node.input[:] = [cast.output[0] if name == images.name else name for name in node.input]
    model.graph.node.insert(0, cast)
    del model.graph.value_info[:]  # has the types of moved uint8 values
