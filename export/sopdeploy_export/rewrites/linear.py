"""Linear maps around a matrix square root.

- Rule: Einsum `bim,bjm->bij` and its relatives are products of matrices, of which some are transposed.
- Centering: if alpha + m beta = 0, the product X (alpha I + beta 11^T) is alpha (X - mean(X)): m additions per
  row, not m^2 multiply-adds. Of an infinite element, the product makes infinities and the mean makes NaN. So it
  is no rule of its own: `newton_schulz` replaces it where both end as NaN.
"""

import re

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import (
    Builder,
    Graph,
    Rewrite,
    attribute,
    dims,
    operand,
    producer,
    rows,
    square,
)

EINSUM = "einsum as a matrix product"
ROUNDING = 16 * float(np.finfo(np.float32).eps)


def centering_factor(constant: ir.Value | None, like: ir.Value) -> float | None:
    """Return alpha if *constant* is alpha (I - 11^T / m) for each image of *like* (B, d, m)."""
    repeated = producer(constant, "Tile", "Expand")
    if repeated is not None and square(constant) is None:
        same = dims(repeated.inputs[0])[-2:] == dims(constant)[-2:] and rows(constant) == rows(like)
        constant = repeated.inputs[0] if same else None
    matrix = square(constant)
    if matrix is None or matrix.dtype.kind != "f" or len(matrix) < 2 or len(dims(constant)) > 3:
        return None
    exact, centering = matrix.astype(np.float64), np.eye(len(matrix)) - 1 / len(matrix)
    alpha = float(exact[0, 0] - exact[0, 1])
    difference = np.abs(exact - alpha * centering).max()
    return alpha if alpha > 0 and difference <= ROUNDING * alpha / len(matrix) else None


def einsum_as_product(graph: Graph, node: ir.Node) -> Rewrite | None:
    """Write the Einsum of two batches of matrices as a MatMul, with transposed operands."""
    equation = attribute(node, "equation", "").replace(" ", "") if node.op_type == "Einsum" else ""
    known = re.fullmatch(r"(\w)(\w\w),\1(\w\w)->\1(\w)(\w)", equation)
    if known is None:
        return None
    batch, left, right, row, column = known.groups()
    summed = left.replace(row, "", 1)
    if len({batch, row, column, summed}) != 4 or {*left} != {row, summed} or {*right} != {summed, column}:
        return None
    op, first, second = Builder(graph, node), operand(node, 0), operand(node, 1)
    sizes = {dims(value)[1 + axes.index(summed)] for value, axes in ((first, left), (second, right))}
    if len(sizes) != 1 or None in sizes or rows(first) != rows(second):
        return None  # Einsum repeats an axis of size 1
    x = first if left[1] == summed else op.Transpose(first, perm=[0, 2, 1])
    y = second if right[0] == summed else op.Transpose(second, perm=[0, 2, 1])
    effect = "an operator that the other rules recognize"
    return Rewrite(node.outputs[0], op.MatMul(x, y), (first, second), f"the equation {equation}", effect)
