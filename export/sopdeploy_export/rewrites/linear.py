"""Rules of linear maps around a matrix square root.

- Centering: X (alpha I + beta 11^T) = alpha X + beta (X 1) 1^T. If alpha + n beta = 0, the rows of the
  constant sum to zero and the product is alpha (X - mean(X)): n additions per row, not n^2 multiply-adds.
- Einsum: `bim,bjm->bij` and its relatives are products of matrices, of which some are transposed.
"""

import re

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import Builder, Graph, attribute, dims, operand, producer, square

CENTERING = "centering by mean"
EINSUM = "einsum as a matrix product"
ROUNDING = 16 * float(np.finfo(np.float32).eps)


def centering_factor(constant: ir.Value | None) -> float | None:
    """Return alpha if *constant* is alpha (I - 11^T / n); leading axes of size 1 are ignored."""
    matrix = square(constant)
    if matrix is None or matrix.dtype.kind != "f" or len(matrix) < 2:
        return None
    exact, centering = matrix.astype(np.float64), np.eye(len(matrix)) - 1 / len(matrix)
    alpha = float(exact[0, 0] - exact[0, 1])
    difference = np.abs(exact - alpha * centering).max()
    return alpha if alpha and difference <= ROUNDING * abs(alpha) / len(matrix) else None


def center_by_mean(graph: Graph, node: ir.Node) -> tuple[str, str] | None:
    """Replace the product of a value with a constant alpha (I - 11^T / n) by alpha (X - mean)."""
    if node.op_type != "MatMul":
        return None
    x, constant = operand(node, 0), node.inputs[1]
    repeated = producer(constant, "Tile", "Expand")
    if repeated is not None and dims(repeated.inputs[0])[-2:] == dims(constant)[-2:]:
        constant = repeated.inputs[0]
    alpha = centering_factor(constant)
    if alpha is None:
        return None
    op, size = Builder(graph, node), dims(constant)[-1] or 0
    centered = op.Sub(x, op.ReduceMean(x, np.array([-1]), keepdims=1))
    graph.replace(node.outputs[0], op.Mul(centered, alpha))
    return f"a constant alpha (I - 11^T / {size})", f"{size**2} multiply-adds per row become {size}"


def einsum_as_product(graph: Graph, node: ir.Node) -> tuple[str, str] | None:
    """Write the Einsum of two batches of matrices as a MatMul, with transposed operands."""
    equation = attribute(node, "equation", "").replace(" ", "") if node.op_type == "Einsum" else ""
    known = re.fullmatch(r"(.)(..),\1(..)->\1(.)(.)", equation)
    if known is None:
        return None
    _, left, right, row, column = known.groups()
    summed = left.replace(row, "", 1)
    if len({row, column, summed}) != 3 or {*left} != {row, summed} or {*right} != {summed, column}:
        return None
    op, first, second = Builder(graph, node), operand(node, 0), operand(node, 1)
    first = first if left[1] == summed else op.Transpose(first, perm=[0, 2, 1])
    second = second if right[0] == summed else op.Transpose(second, perm=[0, 2, 1])
    graph.replace(node.outputs[0], op.MatMul(first, second))
    return f"the equation {equation}", "an operator that the other rules recognize"
