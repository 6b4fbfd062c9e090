"""Rules of a mixture whose gate leaves at most K of N weights other than 0.

The mixture is sum_i w_i v_i, where v_i (D,) is computed from map i of N maps. If at most K weights are not 0,
only the maps with the K largest weights matter; others are multiplied by 0. This bound follows from the
operators that compute the weights, never from examples:

- ScatterElements of K values per image into zeros has at most K weights that are not 0.
- Softmax of logits is 0 where they are -inf. ScatterElements of K values into -inf leaves at most K others.
- r_i, the number of j with l_j > l_i, or l_j = l_i and j < i, ranks the logits of an image without ties, so
  at most K of them have r_i < K. Where(r >= K, -inf, l) leaves those. A logit that is not a number makes
  all weights so, in both forms.

TopK selects the largest weights. Softmax weights are not negative, so no other one is 0.

The replacement needs operators between the maps and their vectors that treat every map alike (row-wise). In
form "activations gathered", all maps are computed and K of them are gathered. In form "weights gathered", the
maps are chains of 1x1 convolutions whose weights are constants: W_i x for the chosen i only.

`sum_in_one_product`: sum_k w_k G(L_k R_k) = G([L_1 .. L_K] [w_1 R_1; ..; w_K R_K]) for linear G, such as
reading the triangle of a matrix. The sum is then part of the product, and G runs once.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import (
    ELEMENTWISE,
    Builder,
    Graph,
    attribute,
    axes,
    content,
    dims,
    is_row_wise,
    only_reader,
    producer,
    rows_factor,
    scalar,
)
from sopdeploy_export.rewrites.rule import Finding

NAME = "K of N experts"
TRIANGLE = "one triangle gather after the weighted sum"
WEIGHTS, ACTIVATIONS, MASKED = FORMS = (
    "gathered weights",
    "all projected, activations gathered",
    "all, masked",
)
GATHER_UP_TO = 16  # images in a batch


def most_nonzero(weights: ir.Value | None) -> int | None:
    """Return K if at most K of the weights (B, N) of each image are not 0, and none is negative."""
    node = producer(weights, "Softmax", "Cast", "Identity", "ScatterElements")
    if node is None or len(dims(weights)) != 2:
        return None
    if node.op_type == "Softmax":
        return most_finite(node.inputs[0]) if attribute(node, "axis", -1) % 2 == 1 else None
    if node.op_type == "ScatterElements":
        softmax = producer(node.inputs[2], "Softmax")
        return scattered(node, 0.0) if softmax is not None else None
    return most_nonzero(node.inputs[0])


def most_finite(logits: ir.Value | None) -> int | None:
    """Return K if at most K of the logits (B, N) of each image are not -inf."""
    node = producer(logits, "Where", "ScatterElements", "Cast", "Identity")
    if node is None:
        return None
    if node.op_type == "ScatterElements":
        return scattered(node, -np.inf)
    if node.op_type != "Where":
        return most_finite(node.inputs[0])
    condition, masked = producer(node.inputs[0], "GreaterOrEqual", "Less"), node.inputs[1:]
    if condition is None:
        return None
    hidden, kept = masked if condition.op_type == "GreaterOrEqual" else masked[::-1]
    limit = scalar(condition.inputs[1])
    same = ranked(condition.inputs[0]) is kept
    return int(limit) if limit is not None and limit >= 1 and scalar(hidden) == -np.inf and same else None


def scattered(node: ir.Node, fill: float) -> int | None:
    """Return K if *node* writes K values per image into a tensor of *fill*."""
    base, index = node.inputs[0], dims(node.inputs[1])
    while (wider := producer(base, "Expand", "Identity", "Cast")) is not None:
        base = wider.inputs[0]
    made = producer(base, "ConstantOfShape")
    value = (
        scalar(base)
        if made is None
        else float(
            np.reshape(made.attributes["value"].value.numpy(), ()) if "value" in made.attributes else 0.0
        )
    )
    array = content(base)
    filled = value == fill or (array is not None and bool((array == fill).all()))
    plain = attribute(node, "axis", 0) % 2 == 1 and attribute(node, "reduction", "none") == "none"
    return index[1] if filled and plain and len(index) == 2 else None


def ranked(ranks: ir.Value | None) -> ir.Value | None:
    """Return the logits l (B, N) whose ranks without ties *ranks* are."""
    total = producer(ranks, "ReduceSum", "Cast")
    while total is not None and total.op_type == "Cast":
        total = producer(total.inputs[0], "ReduceSum", "Cast")
    if total is None or attribute(total, "keepdims", 1) or axes(total) != [2]:
        return None
    either = producer(total.inputs[0], "Cast")
    either = producer(either.inputs[0], "Or") if either is not None else None
    if either is None:
        return None
    for first, second in (either.inputs, either.inputs[::-1]):
        greater, both = producer(first, "Greater"), producer(second, "And")
        if greater is None or both is None:
            continue
        for third, earlier in (both.inputs, both.inputs[::-1]):
            equal, order = producer(third, "Equal"), content(earlier)
            if equal is None or order is None or set(equal.inputs) != set(greater.inputs):
                continue
            other, own = (producer(given, "Unsqueeze") for given in greater.inputs)
            total_order = order.ndim >= 2 and any(
                np.array_equal(order.reshape(order.shape[-2:]), side(np.ones(order.shape[-2:], bool), k))
                for side, k in ((np.tril, -1), (np.triu, 1))
            )
            if other is None or own is None or not total_order or other.inputs[0] is not own.inputs[0]:
                continue
            if axes(other) == [1] and axes(own) == [2] and len(dims(own.inputs[0])) == 2:
                return own.inputs[0]
    return None


class Sum(NamedTuple):
    """sum_i w_i v_i as (B, D), with weights (B, N) and vectors (B N, ...) of D elements."""

    weights: ir.Value
    vectors: ir.Value
    count: int


def weighted_sum(node: ir.Node) -> Sum | None:
    """Match the reduction of the product of vectors and weights."""
    if node.op_type != "ReduceSum" or attribute(node, "keepdims", 1) or axes(node) != [1]:
        return None
    multiply = producer(node.inputs[0], "Mul")
    for left, right in (multiply.inputs, multiply.inputs[::-1]) if multiply is not None else ():
        split, unsqueeze, sizes = producer(left, "Reshape"), producer(right, "Unsqueeze"), dims(left)
        if split is None or unsqueeze is None or axes(unsqueeze) != [2] or len(sizes) != 3 or not sizes[1]:
            continue
        weights, vectors = unsqueeze.inputs[0], split.inputs[0]
        own_weights = dims(weights)[1:] == [sizes[1]] and (dims(weights)[0] == 1) == (sizes[0] == 1)
        if own_weights and rows_factor(split) == 1 / sizes[1]:
            return Sum(weights, vectors, sizes[1])
    return None


def find_cone(vectors: ir.Value, count: int) -> tuple[ir.Node, list[ir.Node]] | None:
    """Return the Reshape that makes *count* maps of each image, and the row-wise operators after it."""
    entry: ir.Node | None = None
    found: set[ir.Node] = set()
    waiting = [vectors]
    while waiting:
        node = producer(waiting.pop())
        if node is None:
            return None
        if node.op_type == "Reshape" and rows_factor(node) == count:
            if entry not in {None, node}:
                return None
            entry = node
        elif node not in found:
            if not is_row_wise(node):
                return None
            found.add(node)
            waiting += [given for given in node.inputs if given is not None and content(given) is None]
    return (entry, [node for node in entry.graph if node in found]) if entry is not None else None


def find_convolutions(maps: ir.Value, count: int) -> list[ir.Node] | None:
    """Return the 1x1 convolutions and element-wise functions that compute *maps* (B, count * c, H, W).

    The first convolution has one group, which reads the map of all experts; others have one group per expert.
    """
    chain: list[ir.Node] = []
    while (node := producer(maps)) is not None and only_reader(maps) is not None:
        others, group = (
            [content(given) for given in node.inputs[1:] if given is not None],
            attribute(node, "group", 1),
        )
        if any(other is None for other in others):
            return None
        if node.op_type == "Conv":
            point = others[0].shape[2:] == (1, 1) and set(attribute(node, "strides", [1])) == {1}
            if (
                not point
                or any(attribute(node, "pads", ()))
                or group not in {1, count}
                or len(others[0]) % count
            ):
                return None
        elif node.op_type not in ELEMENTWISE or any(other.size != 1 for other in others):
            return None
        chain.insert(0, node)
        maps = node.inputs[0]
        if node.op_type == "Conv" and group == 1:
            return chain if None not in dims(maps)[1:] else None
    return None


def evaluate_chosen(op: Builder, chain: list[ir.Node], index: ir.Value, count: int) -> ir.Value:
    """Insert the *chain* for the experts *index* (B, K) only; return the maps (B, K, c, H W)."""
    source, graph = chain[0].inputs[0], op.graph
    x = op.reshape(source, -1, 1, dims(source)[1], int(np.prod(dims(source)[2:])))
    for node in chain:
        if node.op_type != "Conv":
            x = op.copy(node, x, *node.inputs[1:])
            continue
        for given in node.inputs[1:]:  # weights (N o, i, 1, 1), and a bias (N o)
            array = content(given)
            bank = graph.constant(
                str(given.name), array.reshape(count, len(array) // count, array.size // len(array)), x
            )
            own = op.Gather(bank, index, axis=0)
            x = op.MatMul(own, x) if given is node.inputs[1] else op.Add(x, own)
    return x


def apply(graph: Graph, node: ir.Node, form: str) -> Finding | None:
    """Evaluate only the K experts with the largest weights."""
    known = weighted_sum(node) if form != MASKED else None
    chosen = most_nonzero(known.weights) if known is not None else None
    cone = find_cone(known.vectors, known.count) if chosen is not None and chosen < known.count else None
    chain = (
        find_convolutions(cone[0].inputs[0], known.count) if cone is not None and form == WEIGHTS else None
    )
    if cone is None or (form == WEIGHTS and chain is None):
        return None
    (weights, vectors, count), (entry, nodes), op = known, cone, graph.before(node)
    values = op.insert("TopK", (weights, np.array([chosen])), {"axis": 1}, outputs=2)
    index = values.producer().outputs[1]
    index.type = ir.TensorType(ir.DataType.INT64)
    if chain is not None:
        rows = op.reshape(evaluate_chosen(op, chain, index, count), -1, *dims(entry.outputs[0])[1:])
    else:
        batch = op.Squeeze(op.Shape(index, start=0, end=1))
        batch.type = index.type
        first = op.Unsqueeze(
            op.Mul(op.Range(np.array(0), batch, np.array(1)), np.array(count)), np.array([1])
        )
        rows = op.Gather(entry.outputs[0], op.reshape(op.Add(first, index), -1), axis=0)
    copies = {entry.outputs[0]: rows}
    for inner in nodes:
        copies[inner.outputs[0]] = op.copy(inner, *(copies.get(given, given) for given in inner.inputs))
    finding = Finding(
        str(node.outputs[0].name),
        f"at most K = {chosen} of N = {count} weights are not 0, by construction of the gate",
        form,
        (str(weights.name), str((entry if chain is None else chain[0]).inputs[0].name)),
    )
    split = op.reshape(copies[vectors], -1, chosen, int(np.prod(dims(vectors)[1:])))
    weighted = op.Mul(split, op.Unsqueeze(values, np.array([2])))
    graph.replace(node.outputs[0], op.ReduceSum(weighted, np.array([1]), keepdims=0))
    return finding


def sum_in_one_product(graph: Graph, node: ir.Node, _form: str) -> Finding | None:
    """Compute a weighted sum of matrix products, and of what is read from them, in one product."""
    known, chain = weighted_sum(node), []
    value = known.vectors if known is not None else None
    while (
        (step := producer(value, "Gather", "Reshape")) is not None
        and is_row_wise(step)
        and only_reader(value)
    ):
        chain.append(step)
        value = step.inputs[0]
    scale, multiply = None, producer(value, "Mul")
    if multiply is not None and only_reader(value) and set(dims(multiply.inputs[1])[1:]) == {1}:
        value, scale = multiply.inputs
    product = producer(value, "MatMul")
    flat = known is not None and len(dims(known.vectors)) == 2
    if product is None or not chain or not flat or only_reader(value) is None:
        return None
    (left, right), (weights, _, count), op = product.inputs, known, graph.before(node)
    sizes = [*dims(left)[1:], *dims(right)[1:]]
    if len(dims(left)) != 3 or len(dims(right)) != 3 or None in sizes:
        return None
    if not dims(left)[0] == dims(right)[0] == dims(known.vectors)[0]:  # one product serves several rows
        return None
    rows, inner, _, columns = sizes
    finding = Finding(
        str(node.outputs[0].name),
        f"a weighted sum of {count} products, and of what is read from them",
        f"1 gather instead of {count}; the last product computes the sum",
        (str(weights.name), str(left.name), str(right.name)),
    )
    factor = op.reshape(weights, -1, 1, 1)
    factor = factor if scale is None else op.Mul(factor, scale)
    wide = op.reshape(
        op.Transpose(op.reshape(left, -1, count, rows, inner), perm=[0, 2, 1, 3]), -1, rows, count * inner
    )
    found = op.MatMul(wide, op.reshape(op.Mul(right, factor), -1, count * inner, columns))
    for step in reversed(chain):
        found = op.copy(step, found, *step.inputs[1:])
    graph.replace(node.outputs[0], found)
    return finding
