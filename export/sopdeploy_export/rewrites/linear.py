"""Rules of linear maps: centering constants, frozen batch norms, row-wise products, and the scale of a root.

- Centering: X (alpha I + beta 11^T) = alpha X + beta (X 1) 1^T for any alpha and beta. If alpha + n beta =
  0, the rows of the constant sum to zero and the product is alpha (X - mean(X)). The rule computes alpha +
  n beta instead of assuming 0, because the position block of the released GSoP code uses I / P - 11^T / P^2
  with n different from P, which does not center. The product costs n^2 multiply-adds per row, the sum n
  additions.
- Copy: reading elements 0, 1, 2, .. of each row in order does not change them.
- Positions: element (i, j) of a matrix of n columns is element i n + j of the matrix in one row.
- Norm before a linear layer: W (s v + t) + b = (W diag(s)) v + (b + W t).
- Scale of a root: W (s v) + b = s (W v) + b for one number s per image. The scale then multiplies the
  logits instead of a d x d matrix.
- Row-wise convolution (GSoP): output r of row i of C (n, k) is w_ir . C_i + b_ir. A convolution of n groups
  with kernel (k, 1) computes it, and so does a product of (n, B, k) with (n, k, r). A frozen batch norm
  before it turns row i into s_i C_i + t_i, and w_ir . (s_i C_i + t_i) + b_ir = (s_i w_ir) . C_i + (b_ir +
  t_i sum(w_ir)). A frozen batch norm after it scales and shifts output ir. The default form is the
  convolution for single images and the product from a batch of four.

Constants are computed in float64 and rounded once.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sopdeploy_export.onnx_graph import (
    Graph,
    attribute,
    axes,
    content,
    dims,
    integers,
    is_row_wise,
    only_reader,
    per_row,
    permutation,
    producer,
    rows_factor,
)
from sopdeploy_export.rewrites.rule import Finding

CENTERING = "centering by mean"
COPY = "copy of all elements as a reshape"
POSITIONS = "constant positions in one gather"
FUSION_NORM = "fusion batch norm folded into the classifier"
COMPENSATION = "post-compensation after the linear layer"
ROWS = "row-wise convolution with its batch norms"
CONVOLUTION, PRODUCT = ROW_FORMS = ("convolution", "batched product")
PRODUCT_FROM = 4  # images in a batch
MIN_SIZE = 3  # replacing smaller centering constants saves nothing
ROUNDING = 16 * float(np.finfo(np.float32).eps)


def recognize(matrix: NDArray[Any] | None) -> tuple[float, float] | None:
    """Find alpha and beta if *matrix* is alpha I + beta 11^T with beta other than 0, up to axes of size 1."""
    if matrix is None or matrix.dtype not in (np.float32, np.float64) or set(matrix.shape[:-2]) - {1}:
        return None
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] < MIN_SIZE:
        return None
    exact = matrix.reshape(matrix.shape[-2:]).astype(np.float64)
    beta = float(exact[0, 1])
    alpha = float(exact[0, 0]) - beta
    rebuilt = alpha * np.eye(len(exact)) + beta
    if 0 in (alpha, beta) or np.abs(rebuilt - exact).max() > ROUNDING * np.abs(exact).max():
        return None
    return alpha, beta


def center_by_mean(graph: Graph, node: ir.Node, _form: str) -> Finding | None:
    """Replace the product of a value with a constant alpha I + beta 11^T on its right."""
    if node.op_type != "MatMul":
        return None
    x, constant = node.inputs
    tiled = producer(constant, "Tile")
    if tiled is not None and (integers(tiled.inputs[1]) or [0])[-2:] == [1, 1]:
        constant = tiled.inputs[0]
    known = recognize(content(constant))
    if known is None:
        return None
    (alpha, beta), size, op, last = known, dims(constant)[-1], graph.before(node), np.array([-1])
    total = alpha + size * beta
    if centers := abs(total) <= ROUNDING * abs(alpha):
        found = op.Mul(op.Sub(x, op.ReduceMean(x, last, keepdims=1)), alpha)
    else:
        found = op.Add(op.Mul(x, alpha), op.Mul(op.ReduceSum(x, last, keepdims=1), beta))
    finding = Finding(
        str(node.outputs[0].name),
        f"a constant alpha I + beta 11^T; alpha + {size} beta = {total:.1g}",
        f"{'the mean is subtracted' if centers else 'not centering: the sum is added'}; "
        f"{size**2} multiply-adds per row become {size}",
        (str(x.name),),
    )
    graph.replace(node.outputs[0], found)
    return finding


def gather_pairs(graph: Graph, node: ir.Node, _form: str) -> Finding | None:
    """Read elements [:, i, j] with one Gather instead of GatherND between two transposes."""
    index = content(node.inputs[1]) if node.op_type == "GatherND" else None
    before, after = producer(node.inputs[0], "Transpose"), only_reader(node.outputs[0], "Transpose")
    if index is None or index.ndim != 2 or index.shape[1] != 2 or attribute(node, "batch_dims", 0):
        return None
    if permutation(before) != [1, 2, 0] or permutation(after) != [1, 0] or None in dims(before.inputs[0])[1:]:
        return None
    x, op, (rows, columns) = before.inputs[0], graph.before(after), dims(before.inputs[0])[1:]
    places = np.where(index < 0, index + np.array([rows, columns]), index).astype(np.int64)
    finding = Finding(
        str(after.outputs[0].name),
        f"{len(index)} constant positions of a matrix of {rows} x {columns}",
        "one Gather, no transposes",
        (str(x.name),),
    )
    flat = op.reshape(x, -1, rows * columns)
    graph.replace(after.outputs[0], op.Gather(flat, places[:, 0] * columns + places[:, 1], axis=1))
    return finding


def rows_of(graph: Graph, value: ir.Value | None) -> float | None:
    """Return the number of rows of *value* per image, along its first axis; None if it is unknown."""
    image, node = graph.graph.inputs[0], producer(value)
    if dims(value) and value.shape[0] == image.shape[0]:
        return 1
    if node is None or (node.op_type != "Reshape" and not is_row_wise(node)):
        return None
    inner = rows_of(graph, node.inputs[0])
    return None if inner is None else inner * ((rows_factor(node) or 0) if node.op_type == "Reshape" else 1)


def count_of(graph: Graph, value: ir.Value | None) -> float | None:
    """Return c if the scalar *value* is c times the number of images."""
    node = producer(value, "Squeeze", "Mul", "Shape")
    if node is None:
        return None
    if node.op_type == "Mul":
        count, factor = count_of(graph, node.inputs[0]), content(node.inputs[1])
        return None if count is None or factor is None or factor.size != 1 else count * float(factor)
    if node.op_type == "Squeeze":
        return count_of(graph, node.inputs[0])
    whole = (attribute(node, "start", 0), attribute(node, "end", None)) == (0, 1)
    return 1 if whole and node.inputs[0] is graph.graph.inputs[0] else None


def contiguous_copy(graph: Graph, node: ir.Node, _form: str) -> Finding | None:
    """Replace a Gather of all elements in order, as the converter writes adaptive pooling, by a Reshape."""
    flat, sizes = producer(node.inputs[0], "Reshape"), dims(node.outputs[0])
    if node.op_type != "Gather" or flat is None or attribute(node, "axis", 0) or None in sizes[1:]:
        return None
    constant, index = np.zeros([1] * len(sizes), np.int64), node.inputs[1]
    while (add := producer(index, "Add")) is not None and content(add.inputs[1]) is not None:
        constant, index = constant + content(add.inputs[1]), add.inputs[0]
    unsqueeze = producer(index, "Unsqueeze")
    multiply = producer(unsqueeze.inputs[0], "Mul") if unsqueeze is not None else None
    counted = producer(multiply.inputs[0], "Range") if multiply is not None else None
    x, length = flat.inputs[0], int(np.prod(sizes[1:]))
    if counted is None or axes(unsqueeze) != list(range(1, len(sizes))) or per_row(x) != length:
        return None
    ends, strides = (
        [content(given) for given in (counted.inputs[0], counted.inputs[2])],
        content(multiply.inputs[1]),
    )
    start_and_step = [None if end is None else int(end) for end in ends]
    if start_and_step != [0, 1] or strides is None or strides.size != 1 or int(strides) != length:
        return None
    rows, count = rows_of(graph, x), count_of(graph, counted.inputs[1])
    in_order = constant.shape == (1, *sizes[1:]) and np.array_equal(constant.reshape(-1), np.arange(length))
    if not in_order or rows is None or rows != count or list(content(flat.inputs[1]).reshape(-1)) != [-1]:
        return None
    value = str(node.outputs[0].name)
    graph.replace(node.outputs[0], graph.before(node).reshape(x, -1, *sizes[1:]))
    return Finding(value, f"all {length} elements of each row in order", "a Reshape, no copy", (str(x.name),))


def affine(norm: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return scale and shift of a batch norm with frozen statistics, in float64."""
    arrays = [content(given) for given in norm.inputs[1:]]
    if any(array is None for array in arrays) or attribute(norm, "training_mode", 0):
        return None
    weight, bias, mean, variance = (array.astype(np.float64) for array in arrays if array is not None)
    scale = weight / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return scale, bias - scale * mean


class Linear(NamedTuple):
    """A linear layer: *node* computes x W^T + b from x (B, in), with W (out, in) and b (out,) or None."""

    node: ir.Node
    weight: NDArray[Any]
    bias: NDArray[Any] | None

    def write(self, graph: Graph, x: ir.Value, weight: NDArray[Any], bias: NDArray[Any] | None) -> ir.Value:
        """Insert the Gemm of *x* with other constants, which take the names of those of this layer."""
        named, op = [str(value.name) for value in self.node.inputs[1:]], graph.before(self.node)
        values = [graph.constant(named[0], weight, x)]
        if bias is not None:
            values.append(graph.constant(named[1] if len(named) > 1 else f"{named[0]}/bias", bias, x))
        return op.Gemm(x, *values, transB=1)


def linear(node: ir.Node | None) -> Linear | None:
    """Read the constants of a Gemm or MatMul of vectors."""
    known = node is not None and node.op_type in {"Gemm", "MatMul"} and len(dims(node.inputs[0])) == 2
    weight = content(node.inputs[1]) if known else None
    if weight is None or weight.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return Linear(node, weight.T, None)
    bias = content(node.inputs[2]) if len(node.inputs) > 2 else None
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    if (
        not plain
        or attribute(node, "transA", 0)
        or (len(node.inputs) > 2 and (bias is None or bias.ndim != 1))
    ):
        return None
    return Linear(node, weight if attribute(node, "transB", 0) else weight.T, bias)


def fold_fusion_norm(graph: Graph, norm: ir.Node, _form: str) -> Finding | None:
    """Fold a frozen batch norm of vectors into the linear layer that alone reads it."""
    known = affine(norm) if norm.op_type == "BatchNormalization" and len(dims(norm.inputs[0])) == 2 else None
    cast = only_reader(norm.outputs[0], "Cast")
    layer = linear(only_reader(norm.outputs[0] if cast is None else cast.outputs[0]))
    if known is None or layer is None:
        return None
    (scale, shift), weight, x = known, layer.weight.astype(np.float64), norm.inputs[0]
    bias = (weight * shift).sum(axis=1) + (0.0 if layer.bias is None else layer.bias.astype(np.float64))
    finding = Finding(
        str(layer.node.outputs[0].name),
        f"frozen statistics of {len(scale)} features, read by one linear layer only",
        f"W diag(s), b + W t; {4 * len(scale)} numbers and one pass over the vector fewer",
        (str(x.name),),
    )
    x = x if cast is None else graph.before(layer.node).copy(cast, x)
    graph.replace(layer.node.outputs[0], layer.write(graph, x, weight * scale, bias))
    return finding


def move_compensation(graph: Graph, node: ir.Node, _form: str) -> Finding | None:
    """Apply one scale per image after a linear layer instead of before it."""
    layer, chain, value = linear(node), [], node.inputs[0] if node.inputs else None
    while layer is not None and producer(value, "Cast", "Gather", "Identity", "Reshape") is not None:
        if only_reader(value) is None or not is_row_wise(value.producer()):
            return None
        chain.append(value.producer())
        value = value.producer().inputs[0]
    multiply = producer(value, "Mul") if chain and only_reader(value) is not None else None
    for matrix, scale in (multiply.inputs, multiply.inputs[::-1]) if multiply is not None else ():
        single = len(dims(matrix)) == len(dims(scale)) and set(dims(scale)[1:]) == {1}
        if single and (per_row(matrix) or 0) > len(layer.weight):
            break
    else:
        return None
    op, x, result, wide = graph.before(node), matrix, node.outputs[0], scale.dtype
    for step in reversed(chain):
        x = op.copy(step, x, *step.inputs[1:])
    found = layer.write(graph, x, layer.weight, None)
    found = found if result.dtype == wide else op.Cast(found, to=int(wide))
    found = op.Mul(found, op.reshape(scale, -1, 1))
    found = found if layer.bias is None else op.Add(found, layer.bias.astype(np.float64))
    cast = only_reader(result, "Cast") if result.dtype != wide else None
    if cast is not None and attribute(cast, "to", 0) == int(wide):
        result = cast.outputs[0]  # the network casts the result back
    elif result.dtype != wide:
        found = op.Cast(found, to=int(result.dtype))
    finding = Finding(
        str(result.name),
        "only this linear layer reads the scaled values; the scale is one number per image",
        f"it multiplies {len(layer.weight)} logits instead of {per_row(matrix)} numbers of the root",
        (str(matrix.name), str(scale.name)),
    )
    graph.replace(result, found)
    return finding


class RowProduct(NamedTuple):
    """The product of each row: *first* and *last* are its operators, weights are (n, k, r), b is (n, r)."""

    first: ir.Node
    last: ir.Node
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def batched_product(node: ir.Node) -> RowProduct | None:
    """Match transpose, product with (n, k, r), transpose, reshape to (B, n r, 1, 1), and a bias."""
    weight = content(node.inputs[1]) if node.op_type == "MatMul" else None
    before, after = producer(node.inputs[0], "Transpose"), only_reader(node.outputs[0], "Transpose")
    if (
        weight is None
        or weight.ndim != 3
        or permutation(before) != [1, 0, 2]
        or permutation(after) != [1, 0, 2]
    ):
        return None
    last, (n, _, r) = only_reader(after.outputs[0], "Reshape"), weight.shape
    if last is None or dims(last.outputs[0])[1:] != [n * r, 1, 1] or rows_factor(last) != 1:
        return None
    added, bias = only_reader(last.outputs[0], "Add"), np.zeros((n, r))
    constant = content(added.inputs[1]) if added is not None else None
    if constant is not None and constant.shape in {(n * r, 1, 1), (1, n * r, 1, 1)}:
        last, bias = added, constant.astype(np.float64).reshape(n, r)
    return RowProduct(before, last, weight.astype(np.float64), bias)


def grouped_convolution(node: ir.Node) -> RowProduct | None:
    """Match a convolution of n groups with kernel (k, 1) on (B, n, k, 1)."""
    weight = content(node.inputs[1]) if node.op_type == "Conv" else None
    sizes, n = dims(node.inputs[0]), attribute(node, "group", 1)
    if weight is None or weight.ndim != 4 or len(sizes) != 4 or sizes[3] != 1 or sizes[1] != n or n == 1:
        return None
    bias = content(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(len(weight))
    if weight.shape[1:] != (1, sizes[2], 1) or any(attribute(node, "pads", ())) or bias is None:
        return None
    rows = weight.astype(np.float64).reshape(n, -1, sizes[2]).transpose(0, 2, 1)
    return RowProduct(node, node, rows, bias.astype(np.float64).reshape(n, -1))


def fold_rows(graph: Graph, node: ir.Node, form: str) -> Finding | None:
    """Fold the batch norms around one row-wise product, and write it in *form*."""
    found = batched_product(node) or grouped_convolution(node) if node not in graph.made else None
    if found is None:
        return None
    (_, last, weight, bias), source = found, found.first.inputs[0]
    if (squeeze := producer(source, "Squeeze")) is not None and axes(squeeze) == [3]:
        source = squeeze.inputs[0] if only_reader(source) is not None else source
    norm = producer(source, "BatchNormalization")
    scales = affine(norm) if norm is not None and only_reader(source) is not None else None
    if scales is None or len(scales[0]) != len(weight) or len(dims(norm.inputs[0])) != 4:
        return None
    bias = bias + scales[1][:, None] * weight.sum(axis=1)
    weight = weight * scales[0][:, None, None]
    after = only_reader(last.outputs[0], "BatchNormalization")
    if after is not None and (scales := affine(after)) is not None:
        scale, shift = (values.reshape(bias.shape) for values in scales)
        weight, bias, last = weight * scale[:, None], bias * scale + shift, after
    x, (n, k, r), op = norm.inputs[0], weight.shape, graph.before(last)
    finding = Finding(
        str(last.outputs[0].name),
        f"{n} groups with kernel ({k}, 1); frozen statistics of {1 + (after is last)} batch norms around it",
        f"one {form}; {4 * n * (1 + r * (after is last))} numbers fewer",
        (str(x.name),),
    )
    weight, bias = (
        (weight, bias[:, None]) if form == PRODUCT else (weight.transpose(0, 2, 1), bias.reshape(-1))
    )
    weight = weight if form == PRODUCT else weight.reshape(n * r, 1, k, 1)
    names = [str(given.name) for given in norm.inputs[1:3]]
    w, b = (graph.constant(name, array, x) for name, array in zip(names, (weight, bias), strict=True))
    if form == CONVOLUTION:
        result = op.Conv(x, w, b, group=n, kernel_shape=[k, 1])
    else:
        product = op.MatMul(op.Transpose(op.Squeeze(x, np.array([3])), perm=[1, 0, 2]), w)
        result = op.reshape(op.Transpose(op.Add(product, b), perm=[1, 0, 2]), -1, n * r, 1, 1)
    graph.replace(last.outputs[0], result)
    return finding
