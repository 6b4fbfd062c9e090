"""Rule: Einsum `bim,bjm->bij` and its relatives are products of matrices, of which some are transposed."""

import re

import onnx_ir as ir

from sopdeploy_export.onnx_graph import Builder, Graph, Rewrite, attribute, dims, operand, rows

EINSUM = "einsum as a matrix product"


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
