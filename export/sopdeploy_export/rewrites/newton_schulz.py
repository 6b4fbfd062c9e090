"""Rule: compute the matrix square root of iSQRT-COV with fewer operations, however it is written.

Let X (r, c) be a map and P = X X^T. A value of the graph that is computed from P and identities by sums,
products, transposes and division by scalars is a polynomial f(P), and all polynomials of P are symmetric and
commute. Values p(P) X = X p(X^T X) and p(X^T X) are included. So each value is known by one scalar function
f(a, s), where a stands for P and s for the scalars, such as the trace. Two values are equal if their
functions are.

The rule computes the function of each operator, and compares that of the result with
rho Y_N(alpha a), the N-th iterate of Newton-Schulz (iSQRT-COV, Eq. 4: Y_0 = A, Z_0 = I, T = (3 I - Z Y) / 2,
Y <- Y T, Z <- T Z). So it recognizes every order of factors, `baddbmm`, and products with the identity. The
functions are compared at points of the prime field of 2^521 - 1 elements, with floats as the exact fractions
that they are. The points depend on the root of the graph. Two different polynomials of degree D agree at such
a point with probability D / 2^521 (Schwartz and Zippel); for N = 15, D is 3^15.

The replacement takes these steps, where n = 1 / alpha is the norm:

- The first step uses Z = I and the last one computes only Y or Z: 3N - 3 products.
- With H = -Z / 2, T = 3/2 I + H Y, so no matrix is scaled.
- Y_N(X X^T / n) = X Z_N(X^T X / n) X^T / n, which takes fewer products if c < r.
- trace(X X^T) = trace(X^T X), and the sums of squares of both are equal. So constant factors of P, such as
  1 / M, multiply scalars instead of matrices.
- If X has the mean 0 along c, X X^T = X R^T for each R = X + m 1^T. `(x - mean) @ x.T` is therefore P, too.
"""

import functools
import hashlib
import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sopdeploy_export.onnx_graph import (
    Graph,
    attribute,
    axes,
    content,
    dims,
    integers,
    is_constant,
    permutation,
    producer,
    scalar,
)
from sopdeploy_export.rewrites.rule import Finding

NAME = "Newton-Schulz in 3N-3 products"
PRIME = 2**521 - 1
LARGEST = 2**200
MOST_STEPS = 15
ROWS, COLUMNS = "rows", "columns"
SCALAR, IDENTITY, DIAGONAL, SQUARE = ("scalar", ""), ("identity", ""), ("diagonal", ""), ("square", "")
MATRICES = {(one, other) for one in (ROWS, COLUMNS) for other in (ROWS, COLUMNS)}
PARTIAL = ("partial", "")  # sums over one axis of a diagonal matrix
REPEATING = ("EyeLike", "Expand", "Mul", "Tile")
OPAQUE = frozenset({"Abs", "Clip", "Max", "Min", "Pow", "Reciprocal", "Sqrt"})  # of scalars


class Term(NamedTuple):
    """A function f(a, s): its *kind*, and its values at three points.

    The second point differs from the first in a, the third in s. A matrix of kind (rows, columns) is f(P) X.
    """

    kind: tuple[str, str]
    at: tuple[int, ...]

    def __mul__(self, other: "Term") -> "Term":
        at = tuple(x * y % PRIME for x, y in zip(self.at, other.at, strict=True))
        return Term(self.kind if other.kind == SCALAR else other.kind, at)

    def __add__(self, other: "Term") -> "Term":
        at = tuple((x + y) % PRIME for x, y in zip(self.at, other.at, strict=True))
        return Term(other.kind if self.kind == IDENTITY else self.kind, at)

    def inverse(self) -> "Term":
        """Compute 1 / f, and 0 where f is 0."""
        return Term(self.kind, tuple(pow(x, PRIME - 2, PRIME) for x in self.at))

    @property
    def is_matrix(self) -> bool:
        """Whether this is a polynomial of X X^T or of X^T X."""
        return self.kind in {(ROWS, ROWS), (COLUMNS, COLUMNS)}

    @property
    def is_free(self) -> bool:
        """Whether f does not depend on a."""
        return self.at[0] == self.at[1]

    @property
    def fraction(self) -> Fraction | None:
        """The number that f is, if it is constant: the quotient of two integers below 2^200."""
        if len(set(self.at)) != 1:
            return None
        (above, numerator), (below, denominator) = (PRIME, self.at[0]), (0, 1)
        while abs(numerator) >= LARGEST:  # Euclid's algorithm, halfway
            quotient = above // numerator
            above, numerator = numerator, above - quotient * numerator
            below, denominator = denominator, below - quotient * denominator
        return Fraction(numerator, denominator) if 0 < abs(denominator) < LARGEST else None


def number(value: float) -> Term:
    """Return the constant function *value*, as the exact fraction that the float is."""
    exact = Fraction(value)
    element = exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME
    return Term(SCALAR, (element,) * 3)


def element(*parts: object) -> int:
    """Derive an element of the field from *parts*."""
    return int.from_bytes(hashlib.shake_256(repr(parts).encode()).digest(72), "big") % PRIME


class Scaled(NamedTuple):
    """A map that is *base*, transposed or not, times a number."""

    base: ir.Value
    transposed: bool
    factor: float


def swaps_last(node: ir.Node) -> bool:
    """Return whether a Transpose exchanges the last two axes only."""
    order = permutation(node)
    return order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def operands(node: ir.Node) -> tuple[Scaled, Scaled] | None:
    """Return the two maps that *node* multiplies: a MatMul, or an Einsum such as bim,bjm->bij."""
    if node.op_type == "MatMul":
        return peel(node.inputs[0]), peel(node.inputs[1])
    equation = attribute(node, "equation", "").replace(" ", "") if node.op_type == "Einsum" else ""
    known = re.fullmatch(r"(.)(.)(.),\1(.)(.)->\1(.)(.)", equation)
    if known is None:
        return None
    _, *left, third, fourth, row, column = known.groups()
    right = [third, fourth]
    summed = (
        ({*left} - {row}).pop()
        if row in left and column in right and row != column and left[0] != left[1]
        else ""
    )
    if {*right} != {summed, column} or {*left} != {summed, row}:
        return None
    first, second = peel(node.inputs[0]), peel(node.inputs[1])
    return (
        first._replace(transposed=first.transposed != (left[0] == summed)),
        second._replace(transposed=second.transposed != (right[1] == summed)),
    )


def peel(value: ir.Value) -> Scaled:
    """Find the map that *value* is a scaled transpose of."""
    transposed, factor = False, 1.0
    while (node := producer(value, "Mul", "Div", "Transpose", "Identity")) is not None:
        if node.op_type in {"Mul", "Div"}:
            left, right = scalar(node.inputs[0]), scalar(node.inputs[1])
            if right is None and (left is None or node.op_type == "Div"):
                break
            factor *= (left if right is None else right) if node.op_type == "Mul" else 1 / right
            value = node.inputs[1] if right is None else node.inputs[0]
            continue
        if node.op_type == "Transpose":
            if not swaps_last(node):
                break
            transposed = not transposed
        value = node.inputs[0]
    return Scaled(value, transposed, factor)


def centered_from(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Return (R, axis) if *value* is R minus its mean along one *axis*, which stays with size 1."""
    node = producer(value, "Sub")
    mean = producer(node.inputs[1], "ReduceMean") if node is not None else None
    if (
        node is None
        or mean is None
        or mean.inputs[0] is not node.inputs[0]
        or not attribute(mean, "keepdims", 1)
    ):
        return None
    return (node.inputs[0], axes(mean)[0]) if len(axes(mean)) == 1 else None


class Region:
    """The values that are functions of one map, and the reductions among them.

    *anchor* is the first product of the map with its transpose.
    """

    def __init__(self, graph: Graph, anchor: ir.Node, factors: tuple[Scaled, Scaled]) -> None:
        self.graph, self.anchor = graph, anchor
        self.a = tuple(element(graph.root, anchor.outputs[0].name, point) for point in (0, 1, 0))
        self.terms: dict[ir.Value, Term] = {}
        self.roots: dict[Term, Term] = {}
        self.reductions: dict[ir.Value, tuple[str, float]] = {}
        left, right = factors
        self.base = left.base
        self.valid = left.transposed != right.transposed and len(dims(left.base)) == 3
        if left.base is not right.base:
            axis = 2 if right.transposed else 1
            if centered_from(left.base) != (right.base, axis):
                self.base = right.base
                self.valid = self.valid and centered_from(right.base) == (left.base, axis)
        if self.valid:
            kind = (ROWS, ROWS) if right.transposed else (COLUMNS, COLUMNS)
            self.terms[self.base] = Term((ROWS, COLUMNS), (1, 1, 1))
            scale = number(left.factor) * number(right.factor)
            self.terms[anchor.outputs[0]] = scale * Term(kind, self.a)
            nodes = graph.nodes()
            start = self.base.producer()
            for node in nodes[nodes.index(start) if start is not None else 0 :]:
                if node is not anchor and any(given in self.terms for given in node.inputs):
                    found = self.evaluate(node)
                    if found is not None:
                        self.terms[node.outputs[0]] = found

    def term(self, value: ir.Value | None) -> Term | None:
        """Return the function of *value*; also of a constant number or a multiple of the identity."""
        if value in self.terms:
            return self.terms[value]
        if not is_constant(value):
            node = producer(value, *REPEATING)
            return None if node is None else self.repeated(node)
        if (single := scalar(value)) is not None:
            return number(single) if math.isfinite(single) else None
        sizes = dims(value)
        if len(sizes) < 2 or sizes[-1] != sizes[-2] or any(size != 1 for size in sizes[:-2]):
            return None
        array = content(value)
        if array is None:
            return None
        matrix = array.reshape(sizes[-2:])
        known = np.array_equal(matrix, matrix[0, 0] * np.eye(len(matrix), dtype=matrix.dtype))
        return number(float(matrix[0, 0]))._replace(kind=IDENTITY) if known else None

    def repeated(self, node: ir.Node) -> Term | None:
        """Return the function of a multiple of the identity that is made or repeated for each image."""
        if node.op_type == "EyeLike":
            shape = producer(node.inputs[0], "ConstantOfShape")
            sizes = integers(shape.inputs[0]) if shape is not None else None
            square = sizes is not None and len(sizes) == 2 and sizes[0] == sizes[1] is not None
            return number(1.0)._replace(kind=IDENTITY) if square and attribute(node, "k", 0) == 0 else None
        term = self.term(node.inputs[0])
        if term is None or term.kind != IDENTITY:
            return None
        if node.op_type == "Mul":
            factor = self.term(node.inputs[1])
            return term * factor if factor is not None and factor.kind == SCALAR else None
        repeats = integers(node.inputs[1])
        return term if node.op_type == "Expand" or (repeats is not None and repeats[-2:] == [1, 1]) else None

    def evaluate(self, node: ir.Node) -> Term | None:  # noqa: C901, PLR0911, PLR0912 # one case per operator
        """Compute the function of the result of *node*; None if it is no function of this calculus."""
        kind, first = node.op_type, self.term(node.inputs[0])
        if first is None or node.domain:
            return None
        if kind in {"ReduceSum", "ReduceL2"}:
            return self.reduced(node, first)
        if kind == "Slice":
            whole = [integers(given) for given in node.inputs[1:]]
            return first if first.kind == PARTIAL and whole == [[0], dims(node.inputs[0])[1:], [1]] else None
        if kind in {"Reshape", "Squeeze", "Unsqueeze"}:
            return first if first.kind == SCALAR and per_image(node.outputs[0]) == 1 else None
        if kind == "Expand":
            return first if first.kind == SCALAR else None
        if kind == "Einsum" and len(node.inputs) == 1:
            return self.traced(node, first)
        terms = [self.term(given) for given in node.inputs if given is not None]
        if kind == "Pow" and first.is_matrix and scalar(node.inputs[1]) == 2:
            return first._replace(kind=SQUARE)
        if any(term is None for term in terms):
            return None
        known = [term for term in terms if term is not None]
        second = known[-1]
        if kind == "Identity":
            return first
        if kind == "Neg":
            return first * number(-1.0)
        if kind == "Transpose":
            return (
                first._replace(kind=first.kind[::-1]) if swaps_last(node) and first.kind in MATRICES else None
            )
        if all(term.kind == SCALAR for term in known):
            return self.of_scalars(node, known)
        if kind in {"Add", "Sub"}:
            same = first.kind == second.kind or IDENTITY in {first.kind, second.kind}
            matrices = {first.kind, second.kind} <= {IDENTITY, (ROWS, ROWS), (COLUMNS, COLUMNS)}
            return first + (second * number(-1.0) if kind == "Sub" else second) if same and matrices else None
        if kind in {"Mul", "Div"} and second.kind == SCALAR:
            return first * (second.inverse() if kind == "Div" else second)
        if kind == "Mul":
            return first * second if first.kind == SCALAR else self.elementwise_product(node, first, second)
        return self.product(first, second) if kind == "MatMul" else None

    def product(self, left: Term, right: Term) -> Term | None:
        """Compute the function of a matrix product; X X^T contributes the factor a."""
        if IDENTITY in {left.kind, right.kind}:
            other = right if left.kind == IDENTITY else left
            return (left * right)._replace(kind=other.kind) if other.kind in MATRICES else None
        if not {left.kind, right.kind} <= MATRICES or left.kind[1] != right.kind[0]:
            return None
        both = left * right
        if not left.is_matrix and not right.is_matrix:
            both = both * Term(SCALAR, self.a)
        return both._replace(kind=(left.kind[0], right.kind[1]))

    def elementwise_product(self, node: ir.Node, first: Term, second: Term) -> Term | None:
        """Select the diagonal by a multiple of the identity, or square the elements."""
        if IDENTITY in {first.kind, second.kind} and (first.is_matrix or second.is_matrix):
            return (first * second)._replace(kind=DIAGONAL)
        return first._replace(kind=SQUARE) if node.inputs[0] is node.inputs[1] and first.is_matrix else None

    def reduced(self, node: ir.Node, term: Term) -> Term | None:
        """Return the trace, the sum of squares or the norm of c P."""
        if term.kind == DIAGONAL and axes(node) in ([1], [2]) and not attribute(node, "keepdims", 1):
            return term._replace(kind=PARTIAL)
        kinds = {DIAGONAL: "trace", PARTIAL: "trace", SQUARE: "squares"}
        kind = kinds.get(term.kind) if node.op_type == "ReduceSum" else "norm" if term.is_matrix else None
        return (
            self.reduction(node, kind, term)
            if axes(node) == ([1] if term.kind == PARTIAL else [1, 2])
            else None
        )

    def traced(self, node: ir.Node, term: Term) -> Term | None:
        """Return the trace of c P, written as an Einsum such as bii->b."""
        before, _, after = attribute(node, "equation", "").replace(" ", "").partition("->")
        diagonal = len(before) == 3 and before[1] == before[2] != before[0] == after
        return self.reduction(node, "trace", term) if diagonal and term.is_matrix else None

    def reduction(self, node: ir.Node, kind: str | None, term: Term) -> Term | None:
        """Return a new scalar for the trace, sum of squares or norm of *term*, which must be c P."""
        factor = (term * Term(SCALAR, self.a).inverse()).fraction
        if kind is None or factor is None or len(dims(node.outputs[0])) not in {1, 3}:
            return None
        self.reductions[node.outputs[0]] = kind, float(factor)
        return self.opaque(kind, factor)

    def of_scalars(self, node: ir.Node, terms: list[Term]) -> Term | None:
        """Compute with scalars exactly, or make the result of another function a new scalar."""
        operator = node.op_type
        if operator in {"Add", "Sub"}:
            return terms[0] + (terms[1] * number(-1.0) if operator == "Sub" else terms[1])
        if operator in {"Mul", "Div"}:
            return terms[0] * (terms[1].inverse() if operator == "Div" else terms[1])
        if operator == "Reciprocal":
            return terms[0].inverse()
        if operator == "Sqrt" and terms[0] in self.roots:
            return self.roots[terms[0]]
        if operator not in OPAQUE:
            return None
        described = sorted((name, str(value.value)) for name, value in node.attributes.items())
        return self.opaque(operator, described, [term.at for term in terms])

    def opaque(self, *parts: object) -> Term:
        """Return a new scalar, a square in the field, that depends on *parts* only."""
        root = [element(self.graph.root, point, *parts) for point in (0, 1)]
        square = [value * value % PRIME for value in root]
        found = Term(SCALAR, (square[0], square[0], square[1]))
        self.roots[found] = Term(SCALAR, (root[0], root[0], root[1]))
        return found

    def result(self) -> ir.Value | None:
        """Return the only matrix that an operator outside of the region reads."""
        exposed = [
            value
            for value, term in self.terms.items()
            if term.kind != SCALAR
            and value is not self.base
            and (
                value.is_graph_output()
                or any(
                    use.node.outputs[0] not in self.terms and use.node.op_type != "Shape"
                    for use in value.uses()
                )
            )
        ]
        inputs = {
            value
            for value in exposed
            if self.terms[value].kind[0] != self.terms[value].kind[1] and peel(value).base is self.base
        }
        found = [value for value in exposed if value not in inputs]
        return found[0] if len(found) == 1 and self.terms[found[0]].is_matrix else None

    def express(self, wanted: Term, before: ir.Node) -> "Scale | None":
        """Write the scalar *wanted* as a number, times or divided by a scalar computed by *before*."""
        if (single := wanted.fraction) is not None:
            return Scale(float(single), None, 1)
        for value, term in self.terms.items():
            if term.kind == SCALAR and dims(value)[1:] == [1, 1] and comes_first(self.graph, value, before):
                for power, ratio in ((1, wanted * term.inverse()), (-1, wanted * term)):
                    if (single := ratio.fraction) is not None:
                        return Scale(float(single), value, power)
        return None


def per_image(value: ir.Value) -> int | None:
    """Return the number of elements per image."""
    sizes = dims(value)
    return math.prod(size for size in sizes if size is not None) if sizes.count(None) <= 1 else None


def comes_first(graph: Graph, value: ir.Value, node: ir.Node) -> bool:
    """Return whether *value* is computed before *node*."""
    order = graph.nodes()
    start = value.producer()
    return start is None or order.index(start) < order.index(node)


class Scale(NamedTuple):
    """The scalar *number* * *value* ^ *power* of each image."""

    number: float
    value: ir.Value | None
    power: int


def iterates(a: Term, steps: int) -> list[Term]:
    """Return Y_1 .. Y_N of the scalar function *a*."""
    y, z, found = a, number(1.0), []
    for _ in range(steps):
        t = (number(3.0) + z * y * number(-1.0)) * number(0.5)
        y, z = y * t, t * z
        found.append(y)
    return found


class Root(NamedTuple):
    """The root rho Y_N(alpha P) of N steps, with the scales rho and alpha."""

    steps: int
    rho: Scale
    alpha: Scale


def recognize(region: Region, result: ir.Value) -> Root | None:
    """Find N, rho and alpha of *result*."""
    function = region.terms[result]._replace(kind=SCALAR)
    end = result.producer()
    candidates: dict[Term, None] = {}
    for term in region.terms.values():
        if term.is_matrix:
            alpha = term._replace(kind=SCALAR) * Term(SCALAR, region.a).inverse()
            if alpha.is_free:
                candidates[alpha] = None
    for alpha in reversed(candidates):
        for step, y in enumerate(iterates(alpha * Term(SCALAR, region.a), MOST_STEPS), start=1):
            ratio = function * y.inverse()
            if ratio.is_free and end is not None:
                scales = region.express(ratio, end), region.express(alpha, end)
                return Root(step, *scales) if None not in scales else None
    return None


def apply(graph: Graph, anchor: ir.Node, _form: str) -> Finding | None:
    """Replace the root that starts with the product *anchor*."""
    factors = (
        operands(anchor) if anchor.op_type in {"MatMul", "Einsum"} and anchor not in graph.made else None
    )
    if factors is None:
        return None
    region = Region(graph, anchor, factors)
    result = region.result() if region.valid else None
    found = recognize(region, result) if result is not None else None
    sizes = dims(region.base)[1:]
    if (
        result is None
        or found is None
        or None in sizes
        or region.base.dtype not in {ir.DataType.FLOAT, ir.DataType.DOUBLE}
    ):
        return None
    rows = region.terms[result].kind == (ROWS, ROWS)
    outer, inner = sizes if rows else sizes[::-1]
    gram = gram_is_cheaper(outer, inner, found.steps)
    write(graph, region, result, found, use_gram=gram)
    products = max(1, 3 * found.steps - 3)
    return Finding(
        value=str(result.name).removesuffix("/before"),
        precondition=f"the polynomial of N = {found.steps} steps on a map of {outer} x {inner}",
        effect=f"{products} products of {inner if gram else outer} rows"
        + (", in the Gram domain" if gram else ""),
        reads=(str(region.base.name),),
    )


def gram_is_cheaper(channels: int, positions: int, steps: int) -> bool:
    """Decide whether the iteration on X^T X takes fewer multiply-adds than on X X^T."""
    products = max(1, 3 * steps - 3)
    return products * positions**3 + 2 * channels * positions**2 < products * channels**3


def write(graph: Graph, region: Region, result: ir.Value, root: Root, *, use_gram: bool) -> None:
    """Write the root in the fewest products, and replace *result* and the reductions of the region."""
    x, op, rows = region.base, graph.before(region.anchor), region.terms[result].kind == (ROWS, ROWS)
    flipped = op.Transpose(x, perm=[0, 2, 1])
    left, right = (x, flipped) if rows else (flipped, x)  # the result has the rows of `left`
    p = op.MatMul(right, left) if use_gram else op.MatMul(left, right)
    eye = np.eye(dims(x)[1 if rows != use_gram else 2])
    moved: dict[ir.Value | None, ir.Value] = {}
    for value, (kind, factor) in region.reductions.items():
        names = {"keepdims": int(len(dims(value)) == 3)}
        if kind == "norm":
            total, factor = op.ReduceL2(p, np.array([1, 2]), **names), abs(factor)
        else:
            total = op.ReduceSum(op.Mul(p, eye if kind == "trace" else p), np.array([1, 2]), **names)
            factor = factor if kind == "trace" else factor**2
        moved[value] = total if factor == 1 else op.Mul(total, factor)
        graph.replace(value, moved[value])
    op = graph.before(result.producer())

    def scaled(matrix: ir.Value, *scales: Scale) -> ir.Value:
        """Multiply *matrix* by *scales*, which are multiplied first."""
        factor = math.prod(scale.number for scale in scales)
        above = [moved.get(s.value, s.value) for s in scales if s.value is not None and s.power == 1]
        below = [moved.get(s.value, s.value) for s in scales if s.value is not None and s.power == -1]
        if not above and not below:
            return matrix if factor == 1 else op.Mul(matrix, factor)
        if not above:
            by = functools.reduce(op.Mul, below)
            return op.Div(matrix, by if factor == 1 else op.Mul(by, 1 / factor))
        by = functools.reduce(op.Div, below, functools.reduce(op.Mul, above))
        return op.Mul(matrix, by if factor == 1 else op.Mul(by, factor))

    y, half = scaled(p, root.alpha), None
    identity = graph.constant(f"{result.name}/identity", 1.5 * eye, x)
    t = op.Sub(identity, op.Mul(y, 0.5))
    for _ in range(root.steps - 1):
        half = op.Mul(t, -0.5) if half is None else op.MatMul(t, half)
        y = op.MatMul(y, t)
        t = op.Add(op.MatMul(half, y), identity)
    if use_gram:
        z = t if half is None else op.MatMul(t, half)
        z = scaled(z, root.alpha, root.rho, Scale(1.0 if half is None else -2.0, None, 1))
        found = op.MatMul(op.MatMul(left, z), right)
    else:
        found = scaled(op.MatMul(y, t), root.rho)
    graph.replace(result, found)
