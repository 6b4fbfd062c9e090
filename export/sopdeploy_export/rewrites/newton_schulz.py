"""Rule: compute the matrix square root of iSQRT-COV with fewer operations, however its loop is written.

Let A = L R be a product of matrices of n rows and columns. A value that the graph computes from A, identities
and scalars of each image by sums and products is a polynomial f(A), and all polynomials of A commute. So each
value is known by a scalar function f(a, s), where a stands for A and s for the scalars, such as the trace.
Two values are equal if their functions are.

The rule compares the function of the result with rho Y_N(alpha a), the N-th iterate of Newton-Schulz
(iSQRT-COV, Eq. 4: Y_0 = A, Z_0 = I, T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z). So it recognizes every order of
factors, `baddbmm`, and products with the identity. Functions are compared at two points of the prime field of
2^521 - 1 elements, which differ in a, with floats as exact fractions. The points depend on the root of the
graph. Two polynomials of degree D agree at a point with probability D / 2^521 (Schwartz and Zippel); for
N = 15, D is 3^15.

The replacement takes these steps:

- The first step uses Z = I and the last one computes only Y or Z: 3N - 3 products.
- With H = -Z / 2, T = 3/2 I + H Y, so no matrix is scaled.
- If L has m < n columns: Y_N(alpha L R) = alpha L Z_N(alpha R L) R, because p(L R) L = L p(R L) for each
  polynomial p. The iteration then runs on m rows.
- trace(L R) = trace(R L).

The layers of this library are written so already. The rule serves networks that contain the paper's loop.
"""

import hashlib
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import (
    Builder,
    Graph,
    attribute,
    axes,
    content,
    dims,
    operand,
    scalar,
    square,
)

NAME = "Newton-Schulz in 3N-3 products"
PRIME = 2**521 - 1
LARGEST = 2**200
MOST_STEPS = 15
# Kinds: a scalar of each image, a multiple of the identity, a polynomial of A, a polynomial of A with zeros
# outside of the diagonal, and sums along the rows of that.
SCALAR, IDENTITY, MATRIX, DIAGONAL, SUMS = "scalar", "identity", "matrix", "diagonal", "sums"
MATRICES = (MATRIX, IDENTITY)
SUMS_AND_PRODUCTS = {(a, b): MATRIX if MATRIX in (a, b) else IDENTITY for a in MATRICES for b in MATRICES}
SCALED = {(kind, SCALAR): kind for kind in MATRICES}
ELEMENTWISE_PRODUCTS = SCALED | {(SCALAR, kind): kind for kind in MATRICES}
ELEMENTWISE_PRODUCTS |= {(MATRIX, IDENTITY): DIAGONAL, (IDENTITY, MATRIX): DIAGONAL}
OPERATORS = {
    "Add": (operator.add, SUMS_AND_PRODUCTS),
    "Sub": (operator.sub, SUMS_AND_PRODUCTS),
    "MatMul": (operator.mul, SUMS_AND_PRODUCTS),
    "Mul": (operator.mul, ELEMENTWISE_PRODUCTS),
    "Div": (operator.truediv, SCALED),
}


@dataclass(frozen=True)
class Function:
    """The values of a function f(a, s) at two points of the field, which differ in a."""

    first: int
    second: int

    def __add__(self, other: "Function") -> "Function":
        return Function((self.first + other.first) % PRIME, (self.second + other.second) % PRIME)

    def __sub__(self, other: "Function") -> "Function":
        return Function((self.first - other.first) % PRIME, (self.second - other.second) % PRIME)

    def __mul__(self, other: "Function") -> "Function":
        return Function(self.first * other.first % PRIME, self.second * other.second % PRIME)

    def __truediv__(self, other: "Function") -> "Function":  # 0 where *other* is 0
        inverse = [pow(element, -1, PRIME) if element else 0 for element in (other.first, other.second)]
        return self * Function(*inverse)

    @property
    def is_free(self) -> bool:
        """Whether f does not depend on a, and is not 0."""
        return self.first == self.second != 0

    @property
    def fraction(self) -> float | None:
        """The value of f if it is a constant, a quotient of two integers below 2^200; otherwise None."""
        (above, numerator), (below, denominator) = (PRIME, self.first), (0, 1)
        while abs(numerator) >= LARGEST:  # Euclid's algorithm, halfway
            quotient = above // numerator
            above, numerator = numerator, above - quotient * numerator
            below, denominator = denominator, below - quotient * denominator
        constant = self.is_free and 0 < abs(denominator) < LARGEST
        return float(Fraction(numerator, denominator)) if constant else None


def number(value: float) -> Function:
    """Return the constant function *value*, as the exact fraction that the float is."""
    exact = Fraction(value)
    element = exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME
    return Function(element, element)


def variable(*parts: str) -> Function:
    """Return a scalar that is free of a, with a value that is derived from *parts*."""
    element = int.from_bytes(hashlib.shake_256(repr(parts).encode()).digest(72), "big") % PRIME
    return Function(element, element)


class Term(NamedTuple):
    """The kind and the function of a value."""

    kind: str
    function: Function


class Scale(NamedTuple):
    """The scalar *number* * *value* ^ *power* of each image."""

    number: float
    value: ir.Value | None = None
    power: int = 1


class Root(NamedTuple):
    """The value rho Y_N(alpha A) of N steps."""

    value: ir.Value
    steps: int
    rho: Scale
    alpha: Scale


class Region:
    """The values of *graph* that are functions of A, the result of the product *anchor*.

    `terms` maps these values to their terms, and `traces` maps each trace of c A to the number c. `a` is the
    function of A itself.
    """

    def __init__(self, graph: Graph, anchor: ir.Node) -> None:
        self.root = graph.root
        self.a = Function(variable(self.root, "first").first, variable(self.root, "second").second)
        self.terms = {anchor.outputs[0]: Term(MATRIX, self.a)}
        self.traces: dict[ir.Value, float] = {}
        for node in graph.nodes():
            term = None if node.domain or node is anchor or not node.inputs else self.evaluate(node)
            if term is not None:
                self.terms[node.outputs[0]] = term

    def term(self, value: ir.Value | None) -> Term | None:
        """Return the term of *value*: an operator's result, a constant or a scalar of each image."""
        if value is None:
            return None
        if value in self.terms:
            return self.terms[value]
        sizes, single = dims(value), scalar(value)
        if len(sizes) > 3:
            return None
        if single is not None:
            return Term(SCALAR, number(single)) if np.isfinite(single) and single else None
        if len(sizes) == 3 and sizes[1:] == [1, 1]:
            self.terms[value] = Term(SCALAR, variable(self.root, str(value.name)))
            return self.terms[value]
        matrix = square(value)
        if matrix is None:
            return None
        multiple_of_identity = matrix[0, 0] * np.eye(len(matrix), dtype=matrix.dtype)
        if not np.array_equal(matrix, multiple_of_identity):
            return None
        return Term(IDENTITY, number(float(matrix[0, 0])))

    def evaluate(self, node: ir.Node) -> Term | None:
        """Compute the term of the result of *node*; None if it has none."""
        first = self.term(node.inputs[0])
        if first is None:
            return None
        if node.op_type in {"ReduceSum", "Slice"}:
            return self.diagonal_sum(node, first)
        if node.op_type in {"Expand", "Tile", "Identity"}:
            keeps_shape = dims(node.inputs[0])[-2:] == dims(node.outputs[0])[-2:]
            return first if first.kind == SCALAR or keeps_shape else None
        second = self.term(node.inputs[1]) if len(node.inputs) == 2 else None
        if second is None or node.op_type not in OPERATORS:
            return None
        compute, kinds = OPERATORS[node.op_type]
        kind = kinds.get((first.kind, second.kind))
        return None if kind is None else Term(kind, compute(first.function, second.function))

    def diagonal_sum(self, node: ir.Node, term: Term) -> Term | None:
        """Compute the term of a sum of a diagonal over one axis; record a sum over both as a trace of c A.

        A trace is one sum over both axes, or two sums, maybe with a slice of all elements between them.
        """
        if node.op_type == "Slice":
            constants = [content(bound) for bound in node.inputs[1:]]
            bounds = [None if constant is None else constant.tolist() for constant in constants]
            all_elements = [[0], dims(node.inputs[0])[1:], [1]]  # from, to, axes
            return term if term.kind == SUMS and bounds == all_elements else None
        over, keep = axes(node), attribute(node, "keepdims", 1)
        if term.kind == DIAGONAL and over in ([1], [2]) and not keep:
            return term._replace(kind=SUMS)
        factor = (term.function / self.a).fraction
        if factor is not None and (term.kind, over) in ((DIAGONAL, [1, 2]), (SUMS, [1])):
            self.traces[node.outputs[0]] = factor
        return None

    def find_root(self) -> Root | None:
        """Return the root, if operators outside of the region read only one polynomial and it is a root.

        Multiples alpha A, which the root starts from, may be read, too.
        """
        alphas, results = [], []
        for value, (kind, function) in self.terms.items():
            alpha = function / self.a
            if kind == MATRIX and alpha.is_free:
                alphas.append(alpha)
            elif kind == MATRIX and self.is_read_outside(value):
                results.append(value)
        if len(results) != 1:
            return None
        (result,) = results
        for alpha in reversed(alphas):
            y, z = alpha * self.a, number(1.0)
            for steps in range(1, MOST_STEPS + 1):
                t = number(1.5) - number(0.5) * z * y
                y, z = y * t, t * z
                rho = self.terms[result].function / y
                if rho.is_free:
                    rho_scale, alpha_scale = self.express(rho), self.express(alpha)
                    return Root(result, steps, rho_scale, alpha_scale) if rho_scale and alpha_scale else None
        return None

    def is_read_outside(self, value: ir.Value) -> bool:
        """Return whether an operator outside of the region reads *value*."""
        readers = {use.node.outputs[0] for use in value.uses() if use.node.op_type != "Shape"}
        return value.is_graph_output() or not readers <= self.terms.keys()

    def express(self, wanted: Function) -> Scale | None:
        """Write the scalar *wanted* as a number, times or divided by a scalar of the region."""
        if (factor := wanted.fraction) is not None:
            return Scale(factor)
        scalars = [(value, function) for value, (kind, function) in self.terms.items() if kind == SCALAR]
        for value, function in scalars:
            for power, ratio in ((1, wanted / function), (-1, wanted * function)):
                if (factor := ratio.fraction) is not None:
                    return Scale(factor, value, power)
        return None


def apply(graph: Graph, anchor: ir.Node) -> tuple[str, str] | None:
    """Replace the root that starts with the product *anchor*."""
    sizes, left = dims(anchor.outputs[0]), dims(anchor.inputs[0]) if anchor.inputs else []
    if anchor.op_type != "MatMul" or len(sizes) != 3 or not left:
        return None
    rows, inner = sizes[1], left[-1]
    exact = anchor.outputs[0].dtype in {ir.DataType.FLOAT, ir.DataType.DOUBLE}
    if rows is None or inner is None or rows != sizes[2] or not exact:
        return None
    region = Region(graph, anchor)
    root = region.find_root()
    if root is None:
        return None
    before = sum(node.op_type == "MatMul" and node.outputs[0] in region.terms for node in graph.nodes()) - 1
    products = max(1, 3 * root.steps - 3)
    use_inner = 2 * rows * inner**2 + products * inner**3 < products * rows**3
    if before <= products and not use_inner:
        return None
    write(graph, region, anchor, root, inner if use_inner else None)
    return (
        f"the polynomial of N = {root.steps} steps on a product of {rows} x {inner} elements",
        f"{before} products of {rows} rows become {products} of {inner if use_inner else rows}",
    )


def write(graph: Graph, region: Region, anchor: ir.Node, root: Root, inner: int | None) -> None:
    """Replace the value of *root* by 3N - 3 products, on L R or on R L of *inner* rows, and the traces."""
    left, right, p = operand(anchor, 0), operand(anchor, 1), anchor.outputs[0]
    op, moved = Builder(graph, anchor), {}
    if inner is not None:
        p = op.MatMul(right, left)
        for value, factor in region.traces.items():
            keep = int(len(dims(value)) == 3)
            diagonal = op.Mul(p, factor * np.eye(inner))
            moved[value] = op.ReduceSum(diagonal, np.array([1, 2]), keepdims=keep)
            graph.replace(value, moved[value])
    rho, alpha = (
        scale if scale.value is None else scale._replace(value=moved.get(scale.value, scale.value))
        for scale in (root.rho, root.alpha)
    )
    op = Builder(graph, root.value.producer() or anchor)
    identity = 1.5 * np.eye(inner or dims(p)[1] or 0)
    y, half = scaled(op, p, alpha), None
    t = op.Sub(identity, op.Mul(y, 0.5))
    for _ in range(root.steps - 1):
        half = op.Mul(t, -0.5) if half is None else op.MatMul(t, half)
        y = op.MatMul(y, t)
        t = op.Add(op.MatMul(half, y), identity)
    if inner is None:
        graph.replace(root.value, scaled(op, op.MatMul(y, t), rho))
        return
    z = t if half is None else op.MatMul(t, half)
    z = scaled(op, z, alpha, rho, Scale(1.0 if half is None else -2.0))
    graph.replace(root.value, op.MatMul(op.MatMul(left, z), right))


def scaled(op: Builder, matrix: ir.Value, *scales: Scale) -> ir.Value:
    """Multiply *matrix* by *scales*, which are multiplied first."""
    product: ir.Value | float = float(np.prod([scale.number for scale in scales]))
    for scale in scales:
        if scale.value is not None:
            product = (op.Mul if scale.power == 1 else op.Div)(product, scale.value)
    return matrix if product == 1.0 else op.Mul(matrix, product)
