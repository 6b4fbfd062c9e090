"""Rewrites that a TensorRT release needs, each exact: the graph means the same in ONNX before and after.

- TensorRT 8.6 ignores the axes *input* that the Reduce operators have since opset 18 (but for ReduceSum) and
  reduces over everything. Nothing fails, because the result broadcasts. In opset 17 axes are an attribute.
- An unsigned byte may stand in TensorRT only at the network's border, so the cast must be the first operator:
  moving bytes and then widening them is widening them and then moving.
"""

import onnx
from onnx import TensorProto, helper

from sopdeploy.engines.binding import Version
from sopdeploy.engines.record import Hazard
from sopdeploy.errors import LoweringError
from sopdeploy_export.engine_graph import MOVES, array, constants

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
