"""Rule: compute the matrix square root of iSQRT-COV with fewer operations, however its loop is written.

The layer is rho Y_N(A / n) of the covariance A and its trace or Frobenius norm n, which `covariances`
recognizes. With Y_0 = A / n and Z_0 = I, the steps are T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z (iSQRT-COV,
Eq. 4). As n is at least the largest eigenvalue of A, the eigenvalues of Y_0 are between 0 and 1.

From Y_0 on, values of the loop are sums and products of Y_0, identities and finite constants; no other value
of an image takes part. Each has the shape of Y_0 and is f(Y_0) for a polynomial f. All of them commute, so
the order of factors, `baddbmm` and products with the identity do not matter. Polynomials are compared at two
points of the prime field of 2^521 - 1 elements, which depend on the root of the graph, with floats as exact
fractions. Two polynomials of degree D agree at a point with probability D / 2^521 (Schwartz and Zippel); for
N = 15, D is 3^15. Between 0 and 1, the largest absolute value of each f is at least 2^-10 and at most 2^10:
nothing large cancels, overflows or vanishes.

The replacement takes these steps:

- The first step uses Z = I and the last one computes only Y or Z: 3N - 3 products.
- With H = -Z / 2, T = 3/2 I + H Y, so no matrix is scaled.
- If X has m < d columns: Y_N(X X^T / n) = X Z_N(X^T X / n) X^T / n, because p(L R) L = L p(R L) for each
  polynomial p. The iteration then runs on m rows. X^T X has the same trace and Frobenius norm.
  The sums for n are those of X^T X. This step is taken only if all that depends on A is the product with
  sqrt(n): where n is NaN, infinite or 0, both forms are NaN.

A product with the centering constant stays: its rounding, which makes the root of constant maps NaN, would be
lost with it.

The layers of this library are written so already. The rule serves networks that contain the paper's loop.
"""

import hashlib
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sopdeploy_export.covariances import (
    KEEPS_NUMBERS,
    ROUNDING,
    Gram,
    Norm,
    find_gram,
    find_norm,
    identity_factor,
    per_image,
    unscaled,
)
from sopdeploy_export.onnx_graph import (
    Builder,
    Graph,
    Rewrite,
    dims,
    is_constant,
    operand,
    producer,
    rows,
    scalar,
)

NEWTON_SCHULZ = "Newton-Schulz in 3N-3 products"
PRIME = 2**521 - 1
LARGEST = 2**200
MOST_STEPS = 15
BOUND = 2.0**10
_GRID = np.linspace(0.0, 1.0, 33)  # eigenvalues of Y_0
_NUMBER, IDENTITY, MATRIX = "number", "identity", "matrix"
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "MatMul": operator.mul,
    "Mul": operator.mul,
}


class Term(NamedTuple):
    """A number, or a polynomial of Y_0: its values at two points of the field and on `_GRID`."""

    kind: str
    at_points: NDArray[Any]
    on_grid: NDArray[np.float64]


class Start(NamedTuple):
    """Y_0 = *factor* A / n."""

    value: ir.Value
    gram: Gram
    factor: float
    norm: Norm
    divisor: ir.Value


class Root(NamedTuple):
    """The value *factor* Y_N of N steps."""

    value: ir.Value
    steps: int
    factor: float


def _number(value: float | None) -> Term | None:
    """Represent a constant, in the field by the exact fraction that it is; None for 0, NaN and infinity."""
    if value is None or not np.isfinite(value) or value == 0:
        return None
    exact = Fraction(value)
    element = exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME
    at_points = np.array([element, element], object)  # a number has the same value at both
    return Term(_NUMBER, at_points, on_grid=np.full_like(_GRID, value))


def as_fraction(element: int) -> float | None:
    """Return the quotient of two integers below 2^200 that *element* of the field is, if there is one."""
    (above, numerator), (below, denominator) = (PRIME, element), (0, 1)
    while abs(numerator) >= LARGEST:  # Euclid's algorithm, halfway
        quotient = above // numerator
        above, numerator = numerator, above - quotient * numerator
        below, denominator = denominator, below - quotient * denominator
    return float(Fraction(numerator, denominator)) if 0 < abs(denominator) < LARGEST else None


def find_start(node: ir.Node) -> Start | None:
    """Return the normalization that *node* divides by."""
    if node.op_type != "Div" or len(dims(node.outputs[0])) != 3:
        return None
    a, factor = unscaled(operand(node, 0))
    gram, divisor = find_gram(producer(a)), per_image(operand(node, 1), a)
    if gram is None or dims(divisor)[1:] != [1, 1] or rows(node.outputs[0]) is None:
        return None
    norm = find_norm(divisor, a)
    if norm is None or norm.power != 1 or not 1 / BOUND < factor / norm.share < 1 + ROUNDING:
        return None
    return Start(node.outputs[0], gram, factor, norm, divisor)


def find_terms(graph: Graph, start: ir.Value) -> dict[ir.Value, Term]:
    """Compute the values of *graph* that are polynomials of *start*, which takes two values of the field."""
    parts = (hashlib.shake_256(f"{graph.root} {i}".encode()).digest(72) for i in range(2))
    points = np.array([int.from_bytes(part, "big") % PRIME for part in parts], object)
    terms = {start: Term(MATRIX, points, _GRID)}

    def term(value: ir.Value | None) -> Term | None:
        if value is None or value in terms:
            return None if value is None else terms[value]
        known = _number(scalar(value)) if len(dims(value)) <= 3 else None
        if known is None and (known := _number(identity_factor(value, start))) is not None:
            known = known._replace(kind=IDENTITY)
        return known

    for node in graph.nodes():
        if node.domain or terms.keys().isdisjoint(node.inputs):
            continue
        operands = [known for value in node.inputs if (known := term(value)) is not None]
        result = combine(node, operands) if len(operands) == len(node.inputs) else None
        if result is not None and 1 / BOUND <= np.abs(result.on_grid).max() <= BOUND:
            terms[node.outputs[0]] = result
    return terms


def combine(node: ir.Node, operands: list[Term]) -> Term | None:
    """Compute the polynomial of the result of *node*; None if it is none."""
    if node.op_type == "Identity":
        return operands[0]
    if len(operands) != 2 or node.op_type not in {*OPERATORS, "Div"}:
        return None
    first, second = operands
    scales = [known.kind for known in operands].count(_NUMBER) == 1
    if node.op_type == "Div":
        inverse = [pow(element, -1, PRIME) for element in second.at_points]
        second = Term(second.kind, np.array(inverse, object), 1 / second.on_grid)
        scales = second.kind == _NUMBER
    if scales != (node.op_type in {"Mul", "Div"}):
        return None
    compute = OPERATORS.get(node.op_type, operator.mul)
    at_points = compute(first.at_points, second.at_points) % PRIME
    return Term(MATRIX, at_points, compute(first.on_grid, second.on_grid))


def quotient(term: Term, other: NDArray[Any]) -> float | None:
    """Return c if *term* is c times the polynomial *other*."""
    first, second = (
        int(x) * pow(int(y), -1, PRIME) % PRIME for x, y in zip(term.at_points, other, strict=True)
    )
    factor = as_fraction(first) if first == second else None
    return factor if factor is not None and 1 / BOUND < factor < BOUND else None


def find_root(terms: dict[ir.Value, Term], start: ir.Value) -> Root | None:
    """Return the root, if operators outside of the loop read only one polynomial, beside multiples of Y_0."""
    a = terms[start].at_points
    read = [value for value in terms if is_read_outside(value, terms) and quotient(terms[value], a) is None]
    if len(read) != 1:
        return None
    y, z, half = a, a * 0 + 1, pow(2, -1, PRIME)
    for steps in range(1, MOST_STEPS + 1):
        t = (3 - z * y) * half % PRIME
        y, z = y * t % PRIME, t * z % PRIME
        factor = quotient(terms[read[0]], y)
        if factor is not None:
            return Root(read[0], steps, factor)
    return None


def is_read_outside(value: ir.Value, terms: dict[ir.Value, Term]) -> bool:
    """Return whether an operator outside of the loop reads *value*."""
    readers = {use.node.outputs[0] for use in value.uses() if use.node.op_type != "Shape"}
    return value.is_graph_output() or not readers <= terms.keys()


def find_compensation(start: Start, root: Root) -> tuple[ir.Node, ir.Value] | None:
    """Return the product of *root* with sqrt(n), and sqrt(n), if all that depends on A is this product."""
    final = next(iter(root.value.uses())).node if len(root.value.uses()) == 1 else None
    if final is None or final.op_type != "Mul" or root.value.is_graph_output():
        return None
    other = next((value for value in final.inputs if value is not None and value is not root.value), None)
    compensation = None if other is None else per_image(other, start.value)
    value = compensation
    while (node := producer(value, *KEEPS_NUMBERS, "Sqrt")) is not None:
        value = operand(node, 0)
        if node.op_type == "Sqrt":
            break
    divisor: ir.Value | None = start.divisor
    while divisor is not value and (keeps := producer(divisor, *KEEPS_NUMBERS)) is not None:
        divisor = keeps.inputs[0]
    if node is None or compensation is None or divisor is not value or dims(compensation)[1:] != [1, 1]:
        return None
    unread, reached = [start.gram.node], set[ir.Node]()
    while unread:
        for result in unread.pop().outputs:
            if result.is_graph_output():
                return None
            readers = {use.node for use in result.uses() if use.node.op_type != "Shape"} - {final} - reached
            reached |= readers
            unread += readers
    return final, compensation


def shorten_loop(graph: Graph, node: ir.Node) -> Rewrite | None:
    """Replace the root that starts with the normalization *node*."""
    start = find_start(node)
    if start is None or start.value.dtype not in {ir.DataType.FLOAT, ir.DataType.DOUBLE}:
        return None
    terms = find_terms(graph, start.value)
    root = find_root(terms, start.value)
    if root is None:
        return None
    count, inner = dims(start.value)[1] or 0, dims(start.gram.node.inputs[0])[2] or 0
    before = sum(made.op_type == "MatMul" and made.outputs[0] in terms for made in graph.nodes())
    products = max(1, 3 * root.steps - 3)
    use_inner = 2 * count * inner**2 + products * inner**3 < products * count**3
    use_inner = use_inner and not (start.norm.squared and start.gram.centered)  # R L is not symmetric then
    compensated = find_compensation(start, root) if use_inner else None
    use_inner = compensated is not None
    if compensated is not None:
        old, new = compensated[0].outputs[0], write_on_inner(graph, start, root, compensated)
    elif before > products:
        op = Builder(graph, root.value.producer() or node)
        old, new = root.value, times(op, iterate(op, start.value, root, "y"), root.factor)
    else:
        return None
    return Rewrite(
        old,
        new,
        (start.gram.base,),
        f"the polynomial of N = {root.steps} steps on a product of {count} x {inner} elements",
        f"{before} products of {count} rows become {products} of {inner if use_inner else count}",
    )


def times(op: Builder, value: ir.Value, factor: float) -> ir.Value:
    """Multiply *value* by *factor*, unless it is 1."""
    return value if factor == 1 else op.Mul(value, factor)


def iterate(op: Builder, y: ir.Value, root: Root, result: str) -> ir.Value:
    """Compute Y_N or, as *result* says, Z_N of *y* (B, n, n)."""
    identity, half = 1.5 * np.eye(dims(y)[1] or 0), None
    t = op.Sub(identity, op.Mul(y, 0.5))
    for _ in range(root.steps - 1):
        half = op.Mul(t, -0.5) if half is None else op.MatMul(t, half)
        y = op.MatMul(y, t)
        t = op.Add(op.MatMul(half, y), identity)
    if result == "y":
        return op.MatMul(y, t)
    return t if half is None else op.Mul(op.MatMul(t, half), -2.0)


def write_on_inner(graph: Graph, start: Start, root: Root, compensated: tuple[ir.Node, ir.Value]) -> ir.Value:
    """Compute rho Y_N of A = L R from the iteration on R L."""
    final, compensation = compensated
    op, copies = Builder(graph, final), {}
    left, right = (operand(start.gram.node, index) for index in (0, 1))
    p, norm, side = op.MatMul(right, left), start.norm, dims(left)[2] or 0
    elements = times(op, p, norm.factor) if norm.squared else op.Mul(p, norm.factor * np.eye(side))
    elements = op.Mul(elements, elements) if norm.squared else elements
    rank = len(dims(norm.total))
    total = op.ReduceSum(elements, np.array([1, 2]), keepdims=int(rank == 3))
    copies[norm.total] = op.Unsqueeze(total, np.array([1])) if rank == 2 else total
    divisor, root_of_norm = (copy(op, value, copies) for value in (start.divisor, compensation))
    y = op.Div(times(op, p, start.factor), divisor)
    y.shape = ir.Shape([None, side, side])
    scale = op.Mul(op.Div(root_of_norm, divisor), start.factor * root.factor)
    return op.MatMul(op.MatMul(left, op.Mul(iterate(op, y, root, "z"), scale)), right)


def copy(op: Builder, value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """Copy the operators from a copied value to *value*."""
    node = producer(value)
    if value in copies or node is None or is_constant(value):
        return copies.get(value, value)
    copies[value] = op.copy(node, *(given and copy(op, given, copies) for given in node.inputs))
    return copies[value]
