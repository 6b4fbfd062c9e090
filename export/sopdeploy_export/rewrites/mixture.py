"""Rule of a mixture whose gate leaves at most K of N weights other than 0.

The mixture is sum_i w_i v_i, where v_i (D,) is computed from map i of N maps. If at most K weights are not 0,
only the maps with the K largest weights matter; others are multiplied by 0. This bound follows from the
operators that compute the weights, never from examples:

- ScatterElements of K values per image into zeros has at most K weights that are not 0.
- Softmax of logits is 0 where they are -inf. ScatterElements of K values into -inf leaves at most K others.
- r_i, the number of j with l_j > l_i, or l_j = l_i and j < i, ranks the logits of an image without ties, so
  at most K of them have r_i < K. Where(r >= K, -inf, l) leaves those. A logit that is not a number makes
  all weights so, in both forms.

TopK selects the largest weights. Softmax weights are not negative, so no other one is 0.

The maps are chains of 1x1 convolutions with constant weights, and the operators between the maps and their
vectors treat every map alike (row-wise). The replacement gathers the weights of the convolutions and computes
W_i x for the chosen i only. Computing all maps and gathering K of them was never faster. If the vectors are
read from larger ones at constant positions, as a triangle from a matrix, the larger ones are summed first:
sum_i w_i G(v_i) = G(sum_i w_i v_i) for linear G.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import Pattern

from sopdeploy_export.onnx_graph import (
    ELEMENTWISE,
    Builder,
    Graph,
    Rewrite,
    attribute,
    content,
    dims,
    is_constant,
    is_row_wise,
    operand,
    per_row,
    producer,
    rows,
    rows_factor,
    scalar,
    square,
)

EXPERTS = "K of N experts"
NOT_NEGATIVE = ("Abs", "ReduceL2", "Relu", "Sqrt")


def _weighted_sum(op: Any, vectors: Any, sizes: Any, weights: Any) -> Any:
    split = op.Reshape(vectors, sizes, _outputs=["split"])
    return op.ReduceSum(op.Mul(split, op.Unsqueeze(weights, [2])), [1], keepdims=0)


def _kept_by_rank(op: Any, logits: Any, earlier: Any, limit: Any, hidden: Any) -> Any:
    other, own = op.Unsqueeze(logits, [1]), op.Unsqueeze(logits, [2])
    ahead = op.Or(op.Greater(other, own), op.And(op.Equal(other, own), earlier))
    rank = op.ReduceSum(op.Cast(ahead, _outputs=["counted"]), [2], keepdims=0)
    return op.Where(op.GreaterOrEqual(rank, limit), hidden, logits)


WEIGHTED_SUM = Pattern(_weighted_sum)
KEPT_BY_RANK = Pattern(_kept_by_rank)


class Gate(NamedTuple):
    """At most *chosen* of the weights of each image are not 0; they are computed from *logits* (B, N)."""

    chosen: int
    logits: ir.Value


def _find_gate(graph: Graph, weights: ir.Value) -> Gate | None:
    """Return the gate if it bounds the number of *weights* (B, N) that are not 0, and none is negative."""
    node = producer(weights, "Softmax", "ScatterElements", "Cast")
    if node is None or len(dims(weights)) != 2:
        return None
    if node.op_type == "Cast":
        return _find_gate(graph, operand(node, 0))
    if node.op_type == "ScatterElements":
        return scattered(node, 0.0) if producer(node.inputs[2], "Softmax") else None
    logits = producer(node.inputs[0])
    if logits is None or attribute(node, "axis", -1) % 2 != 1:
        return None
    matched = graph.match(KEPT_BY_RANK, logits)
    if not matched:
        return scattered(logits, -np.inf)
    limit, earlier = scalar(matched["limit"]), square(matched["earlier"])
    counted = producer(matched["counted"])
    is_order = earlier is not None and np.array_equal(
        earlier, np.tri(dims(weights)[1] or 0, k=-1, dtype=bool)
    )
    counts = counted is not None and counted.attributes["to"].value in {ir.DataType.INT32, ir.DataType.INT64}
    if not (is_order and counts and limit and limit >= 1 and scalar(matched["hidden"]) == -np.inf):
        return None
    return Gate(int(limit), matched["logits"])


def scattered(node: ir.Node, fill: float) -> Gate | None:
    """Return the gate if *node* writes at K positions per image, from TopK, into a tensor of *fill*."""
    if node.op_type != "ScatterElements" or attribute(node, "reduction", "none") != "none":
        return None
    if attribute(node, "axis", 0) not in (1, -1):  # the components, the last of two axes
        return None
    target, largest, chosen = node.inputs[0], producer(node.inputs[1], "TopK"), dims(node.inputs[1])[1]
    expand, constant = producer(target, "Expand"), producer(target, "ConstantOfShape")
    if constant is not None:
        value = constant.attributes.get("value")
        array = np.zeros(1) if value is None else value.value.numpy()
    else:
        array = content(target if expand is None else expand.inputs[0])
    is_filled = array is not None and bool((array == fill).all())
    return Gate(chosen, operand(largest, 0)) if is_filled and largest and chosen else None


def is_positive(value: ir.Value | None) -> bool:
    """Return whether every element of *value* is above 0, because a Clip or an added constant says so."""
    node = producer(value)
    if node is None or not node.inputs:
        return False
    if node.op_type in {"Expand", "Identity", "Reshape", "Sqrt", "Unsqueeze"}:
        return is_positive(node.inputs[0])
    least = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    bounded = node.op_type == "Clip" or (node.op_type == "Add" and producer(node.inputs[0], *NOT_NEGATIVE))
    return bool(bounded) and least is not None and least > 0


def stays_finite(node: ir.Node) -> bool:
    """Return whether the result of *node* is finite where its operands are, within the range of its type."""
    if node.op_type == "Div":
        divisor = content(node.inputs[1])
        return is_positive(node.inputs[1]) if divisor is None else bool(divisor.all())
    if node.op_type == "Pow":
        exponent = scalar(node.inputs[1])
        return exponent is not None and exponent >= 1 and exponent.is_integer()
    return is_positive(node.inputs[0]) if node.op_type == "Sqrt" else node.op_type != "Exp"


def find_experts(vectors: ir.Value, count: int) -> tuple[ir.Node, list[ir.Node]] | None:
    """Return the Reshape to one map of the *count* experts per row, and the row-wise operators after it."""
    entry: ir.Node | None = None
    row_wise: set[ir.Node] = set()
    unread = [vectors]
    while unread:
        node = producer(unread.pop())
        if node is not None and node.op_type == "Reshape" and rows_factor(node) == count:
            if entry not in {None, node}:
                return None
            entry = node
        elif node is None or not is_row_wise(node) or not stays_finite(node):
            return None
        elif node not in row_wise:
            row_wise.add(node)
            unread += [value for value in node.inputs if value is not None and not is_constant(value)]
    return None if entry is None else (entry, [node for node in entry.graph or () if node in row_wise])


def find_convolutions(maps: ir.Value, count: int) -> list[ir.Node] | None:
    """Return the 1x1 convolutions and element-wise functions that compute *maps* (B, count * c, H, W).

    The first convolution has one group, which reads the map of all experts; others have one group per expert.
    Maps of one position are left alone: copying their weights takes longer than multiplying by all of them.
    """
    chain: list[ir.Node] = []
    while (node := producer(maps)) is not None and len(maps.uses()) == 1:
        operands = [value for value in node.inputs[1:] if value is not None]
        arrays = [array for value in operands if (array := content(value)) is not None]
        if (
            len(arrays) < len(operands)
            or not stays_finite(node)
            or not all(np.isfinite(array).all() for array in arrays)
        ):
            return None
        group = attribute(node, "group", 1)
        if node.op_type == "Conv":
            shape = arrays[0].shape
            moves = set(attribute(node, "strides", [1])) != {1} or any(attribute(node, "pads", ()))
            if shape[2:] != (1, 1) or moves or group not in {1, count} or shape[0] % count:
                return None
        elif node.op_type not in ELEMENTWISE or any(array.size != 1 for array in arrays):
            return None
        chain.insert(0, node)
        maps = operand(node, 0)
        if node.op_type == "Conv" and group == 1:
            return chain if None not in dims(maps)[1:] and dims(maps)[2:] != [1, 1] else None
    return None


def evaluate_chosen(op: Builder, chain: list[ir.Node], index: ir.Value, count: int) -> ir.Value:
    """Insert the *chain* for the experts *index* (B, K) only; return the maps (B, K, c, H W)."""
    source = operand(chain[0], 0)
    channels = dims(source)[1] or 0
    x = op.reshape(source, -1, 1, channels, (per_row(source) or 0) // channels)
    for node in chain:
        if node.op_type != "Conv":
            x = op.copy(node, x, *node.inputs[1:])
            continue
        for parameter in node.inputs[1:]:  # weights (N o, i, 1, 1), and a bias (N o)
            array = np.asarray(content(parameter))
            of_experts = array.reshape(count, len(array) // count, array.size // len(array))
            constant = op.graph.constant(str(parameter and parameter.name), of_experts, x)
            chosen = op.Gather(constant, index, axis=0)
            x = op.MatMul(chosen, x) if parameter is node.inputs[1] else op.Add(x, chosen)
    return x


def choose_experts(graph: Graph, node: ir.Node) -> Rewrite | None:
    """Evaluate only the K experts with the largest weights."""
    matched = graph.match(WEIGHTED_SUM, node)
    if not matched:
        return None
    weights, vectors, split = matched["weights"], matched["vectors"], matched["split"]
    count = dims(split)[1] if len(dims(split)) == 3 else None
    gate, reshape = _find_gate(graph, weights), producer(split)
    if count is None or gate is None or gate.chosen >= count:
        return None
    weights_per_image = dims(weights)[1:] == [count] and rows(weights) == rows(split) is not None
    if not weights_per_image or reshape is None or rows_factor(reshape) != 1 / count:
        return None
    experts = find_experts(vectors, count)
    chain = None if experts is None else find_convolutions(operand(experts[0], 0), count)
    if experts is None or chain is None:
        return None
    (entry, row_wise), chosen, op = experts, gate.chosen, Builder(graph, node)
    largest, index = op.insert("TopK", (weights, np.array([chosen])), {"axis": 1}, outputs=2).outputs
    index.type = ir.TensorType(ir.DataType.INT64)
    shape = [size or 0 for size in dims(entry.outputs[0])[1:]]
    copies = {entry.outputs[0]: op.reshape(evaluate_chosen(op, chain, index, count), -1, *shape)}
    for original in row_wise:
        inputs = [None if value is None else copies.get(value, value) for value in original.inputs]
        copies[original.outputs[0]] = op.copy(original, *inputs)
    gather = producer(vectors, "Gather") if len(dims(vectors)) == 2 else None
    summed = vectors if gather is None or len(dims(gather.inputs[0])) != 2 else operand(gather, 0)
    split = op.reshape(copies[summed], -1, chosen, per_row(summed) or 0)
    total = op.Squeeze(op.MatMul(op.Unsqueeze(largest, np.array([1])), split), np.array([1]))
    if gather is not None and summed is not vectors:
        total = op.copy(gather, total, gather.inputs[1])
    return Rewrite(
        node.outputs[0],
        total,
        (gate.logits, operand(chain[0], 0)),
        f"at most K = {chosen} of N = {count} weights are not 0, by construction of the gate",
        f"{chosen} of {count} experts, with gathered weights",
    )
