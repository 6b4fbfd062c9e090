"""Recognize the covariance of a value and its norm in an ONNX graph, in a closed list of spellings.

The covariance A = X X^T (B, d, d) is the product of X and its transpose, which numbers may scale, and which
the constant alpha (I - 11^T / m) may center. Its norm is the trace or the Frobenius norm: a sum over named
axes of A times the identity, or of A squared. After the sum, only operators that keep one number per image
follow. Every value has the batch of A, see `rows`.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import (
    attribute,
    axes,
    content,
    dims,
    operand,
    producer,
    rows,
    scalar,
    square,
)

ROUNDING = 16 * float(np.finfo(np.float32).eps)
KEEPS_NUMBERS = ("Identity", "Reshape", "Squeeze", "Unsqueeze")


class Factor(NamedTuple):
    """A multiple of *base*, maybe *transposed*, maybe *centered*; *sign* is that of the multiple."""

    base: ir.Value
    transposed: bool
    sign: float
    centered: bool


class Gram(NamedTuple):
    """The product A = c *base* *base*^T, maybe *centered*: X (I - 11^T / m) X^T."""

    node: ir.Node
    base: ir.Value
    centered: bool


class Norm(NamedTuple):
    """A number n of each image: at least *share* times the trace or the Frobenius norm of A to the *power*.

    *total* is the sum that it is computed from, of elements of A that *factor* multiplies; with *squared*, of
    their squares.
    """

    total: ir.Value
    squared: bool
    factor: float
    share: float
    power: int


def unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Return the value that *value* is a constant multiple of, and the number."""
    factor = 1.0
    while (node := producer(value, "Mul", "Div", "Identity")) is not None:
        if node.op_type == "Identity":
            value = operand(node, 0)
            continue
        first, second = scalar(node.inputs[0]), scalar(node.inputs[1])
        by = second if second is not None or node.op_type == "Div" else first
        if by is None or not np.isfinite(by) or not by or len(dims(node.outputs[0])) != 3:
            break
        factor *= 1 / by if node.op_type == "Div" else by
        value = operand(node, 0 if by is second else 1)
    return value, factor


def identity_factor(value: ir.Value | None, like: ir.Value) -> float | None:
    """Return c if *value* is c I for each image of *like*: (d, d), (1, d, d) or (B, d, d)."""
    node, side, matrix = producer(value, "Expand", "Tile", "Mul"), dims(like)[-1] or 0, square(value)
    if matrix is not None:
        identity = matrix[0, 0] * np.eye(side, dtype=matrix.dtype)
        single = len(dims(value)) <= 3
        return float(matrix[0, 0]) if single and np.array_equal(matrix, identity) else None
    if node is None or rows(value) != rows(like) or dims(value)[1:] != [side, side]:
        return None
    if node.op_type != "Mul":
        return identity_factor(node.inputs[0], like)
    for identity, by in (node.inputs, node.inputs[::-1]):
        factors = identity_factor(identity, like), scalar(by)
        if factors[0] is not None and factors[1] is not None:
            return factors[0] * factors[1]
    return None


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


def find_factor(value: ir.Value) -> Factor:
    """Return what constants, a centering and a transposition make *value* of."""
    transposed, sign, centered = False, 1.0, False
    while True:
        value, by = unscaled(value)
        sign *= np.sign(by)
        node = producer(value, "Transpose", "MatMul")
        if node is None or len(dims(value)) != 3:
            break
        if node.op_type == "Transpose" and [*attribute(node, "perm", ())] == [0, 2, 1] and not centered:
            transposed = not transposed
        elif node.op_type == "MatMul" and centering_factor(node.inputs[1], operand(node, 0)) is not None:
            centered = True
        else:
            break
        value = operand(node, 0)
    return Factor(value, transposed, sign, centered)


def find_gram(node: ir.Node | None) -> Gram | None:
    """Return the product X X^T that *node* computes, or X^T X without centering; None for other operators.

    X must have fixed sizes apart from the batch.
    """
    if node is None or node.op_type != "MatMul" or len(dims(node.outputs[0])) != 3:
        return None
    left, right = (find_factor(operand(node, index)) for index in (0, 1))
    symmetric = left.base is right.base and left.transposed != right.transposed and left.sign == right.sign
    centered = left.centered or right.centered
    has_fixed_sizes = None not in dims(left.base)[1:]
    if not symmetric or (centered and left.transposed) or not has_fixed_sizes:
        return None
    return Gram(node, left.base, centered)


def find_total(value: ir.Value, a: ir.Value) -> Norm | None:
    """Return the trace or the sum of squares of a multiple of *a* that *value* is: one number per image."""
    summed = value
    while (node := producer(summed, "ReduceSum", "Slice")) is not None:
        bounds = [None if (array := content(bound)) is None else array.tolist() for bound in node.inputs[1:]]
        rank = len(dims(node.inputs[0]))
        keeps_all = bounds == [[0], dims(node.inputs[0])[1:2], [1]] and rank == 2  # from, to, axes
        sums = node.op_type == "ReduceSum" and bounds not in ([], [[]]) and 0 not in axes(node)
        if not (sums or (node.op_type == "Slice" and keeps_all)):
            return None
        summed = operand(node, 0)
    node = producer(summed, "Mul", "Pow")
    if (
        node is None
        or dims(summed)[1:] != dims(a)[1:]
        or rows(value) != rows(a)
        or not {*dims(value)[1:]} <= {1}
    ):
        return None
    (first, by), other = unscaled(operand(node, 0)), node.inputs[1]
    if node.op_type == "Pow":  # (c A)^2
        if first is not a or scalar(other) != 2:
            return None
        return Norm(value, squared=True, factor=by, share=by**2, power=2)
    if other is not None and unscaled(other)[0] is a and first is a:  # (c A) (d A)
        product = by * unscaled(other)[1]
        return Norm(value, squared=True, factor=product**0.5, share=product, power=2) if product > 0 else None
    for matrix, identity in (node.inputs, node.inputs[::-1]):  # (c A) (d I)
        factor = identity_factor(identity, a)
        if matrix is not None and factor is not None and unscaled(matrix)[0] is a:
            factor *= unscaled(matrix)[1]
            return Norm(value, squared=False, factor=factor, share=factor, power=1) if factor > 0 else None
    return None


def find_norm(value: ir.Value, a: ir.Value) -> Norm | None:
    """Return the norm of *a* that *value* is: one number per image, in any shape."""
    node = producer(value)
    if node is None or rows(value) != rows(a) or not {*dims(value)[1:]} <= {1}:
        return None
    total = find_total(value, a)
    if total is not None or not node.inputs:
        return total
    first, second = node.inputs[0], scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type in {"Add", "Mul"} and second is None:
        first, second = node.inputs[1], scalar(first)
    norm = None if first is None else find_norm(first, a)
    if norm is None or node.op_type in KEEPS_NUMBERS:
        return norm
    if node.op_type == "Sqrt" and norm.power == 2:
        return norm._replace(share=norm.share**0.5, power=1)
    if second is None or not 0 < second < np.inf:
        return None
    if node.op_type in {"Mul", "Div"}:
        return norm._replace(share=norm.share * (second if node.op_type == "Mul" else 1 / second))
    return norm if node.op_type == "Add" or (node.op_type == "Clip" and len(node.inputs) == 2) else None


def per_image(value: ir.Value, like: ir.Value) -> ir.Value:
    """Return the number of each image that *value* repeats for the shape of *like*, or *value* itself."""
    node = producer(value, "Expand")
    repeats = node is not None and dims(value)[1:] == dims(like)[1:] and rows(value) == rows(like)
    return operand(node, 0) if node is not None and repeats else value
