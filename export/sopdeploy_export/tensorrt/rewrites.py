"""Rewrites that a TensorRT release needs, each exact: the graph means the same in ONNX before and after.

- TensorRT 8.6 ignores the axes *input* that the Reduce operators have since opset 18 (but for ReduceSum) and
  reduces over everything. Nothing fails, because the result broadcasts. In opset 17 axes are an attribute.
- An unsigned byte may stand in TensorRT only at the network's border, so the cast must be the first operator:
  moving bytes and then widening them is widening them and then moving.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sopdeploy.errors import LoweringError
from sopdeploy.tensorrt.binding import Version
from sopdeploy.tensorrt.record import Hazard

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


LAST_OPSET_OF_8 = 17
AXES_AS_INPUT = frozenset(
    {
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
    }
)


def axes_as_attributes(model: onnx.ModelProto, version: Version) -> Hazard | None:
    """Turn *model* into opset 17 in place where TensorRT 8.6 is to read it.

    Raises `LoweringError` where axes are computed, or an operator means something else in opset 17.
    """
    opset = next(entry for entry in model.opset_import if entry.domain == "")
    if version >= (10, 0) or opset.version <= LAST_OPSET_OF_8:
        return None
    before = opset.version
    fixed = constants(model)
    reductions = [node for node in model.graph.node if node.op_type in AXES_AS_INPUT]
    for node in reductions:
        move_axes(node, fixed)
    opset.version = LAST_OPSET_OF_8
    drop_defaults(model)
    drop_unused(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise LoweringError(f"no opset {LAST_OPSET_OF_8} form for TensorRT 8.6: {reason}") from problem
    return Hazard(
        rule="reduce-axes-input",
        operators=len(reductions),
        done=f"TensorRT 8.6 ignores axes given as an input: rewritten from opset {before} to "
        f"{LAST_OPSET_OF_8}, where they are an attribute",
    )


def move_axes(node: onnx.NodeProto, fixed: dict[str, onnx.TensorProto]) -> None:
    """Make the axes of the reduction *node* an attribute."""
    no_op = any(a.name == "noop_with_empty_axes" and a.i for a in node.attribute)
    kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in fixed:
            raise LoweringError(
                f"{node.name}: the axes of {node.op_type} are computed; TensorRT needs constants"
            )
        axes = [int(axis) for axis in array(fixed[node.input[1]]).reshape(-1)]
        if not axes and no_op:
            raise LoweringError(f"{node.name}: {node.op_type} over no axes has no form in opset 17")
        kept += [helper.make_attribute("axes", axes)] if axes else []
    elif no_op:
        raise LoweringError(f"{node.name}: {node.op_type} over no axes has no form in opset 17")
    del node.attribute[:]
    node.attribute.extend(kept)
    del node.input[1:]


def drop_defaults(model: onnx.ModelProto) -> None:
    """Drop attributes that opset 17 does not know where they hold what opset 17 does anyway."""
    harmless = {("Cast", "saturate", 1), ("Reshape", "allowzero", 0)}
    for node in model.graph.node:
        kept = [a for a in node.attribute if (node.op_type, a.name, a.i) not in harmless]
        del node.attribute[:]
        node.attribute.extend(kept)


def drop_unused(model: onnx.ModelProto) -> None:
    """Drop the constants that no operator reads any more."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    if len(kept) < len(model.graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del model.graph.initializer[:]
        model.graph.initializer.extend(copies)


def widen_bytes_first(model: onnx.ModelProto, _version: Version) -> Hazard | None:
    """Move the cast of every uint8 input before the operators that only move its bytes, in place.

    Raises `LoweringError` where something else computes with unsigned bytes.
    """
    moved = 0
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            moved += widen_one(model, value.name)
    if not moved:
        return None
    return Hazard(
        rule="uint8-beyond-the-border",
        operators=moved,
        done="TensorRT takes unsigned bytes only at the border: the cast now comes first",
    )


def widen_one(model: onnx.ModelProto, name: str) -> int:
    """Move the cast of the input *name* to the front; return how many operators it passed."""
    chain: list[onnx.NodeProto] = []
    value = name
    while True:
        users = [node for node in model.graph.node if value in node.input]
        if len(users) == 1 and users[0].op_type in MOVES and users[0].input[0] == value:
            chain.append(users[0])
            value = users[0].output[0]
            continue
        break
    if len(users) != 1 or users[0].op_type != "Cast":
        operators = ", ".join(sorted({node.op_type for node in users})) or "the output"
        raise LoweringError(f"{name}: {operators} uses unsigned bytes, which TensorRT only casts")
    if not chain:
        return 0
    cast = users[0]
    final, widened = cast.output[0], f"{name}_widened"
    cast.input[0], cast.output[0] = name, widened
    chain[0].input[0] = widened
    chain[-1].output[0] = final
    nodes = [node for node in model.graph.node if node is not cast]
    place = next(index for index, node in enumerate(nodes) if widened in node.input)
    reordered = [*nodes[:place], cast, *nodes[place:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return len(chain)
