"""What a graph computes of second order, counted from its nodes: covariances, matrix square roots, mixtures.

No name of a network, node or value is read, so the counts describe the file.

- A product of a map with its own transpose is a covariance if the map was centered, as
  Subtract(X, ReduceMean(X)) does, and else a second moment.
- The nodes that multiply, divide, add, subtract and move what a covariance gives are its
  Newton-Schulz iteration. Each of its N steps multiplies an iterate by T = (3 I - Z Y) / 2, the
  difference of a fixed matrix and an iterate. The fixed matrix may have any form: stored, computed by
  nodes such as `EyeLike` or a cast of truth values, or repeated for each image. A sum of a fixed
  matrix and an iterate, as C + 0.001 I, is not a step. A matrix product counts if both of its factors
  come from the covariance.
- A mixture gathers the weights of K of N components by indices of `TopK`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sopdeploy.errors import amount

if TYPE_CHECKING:
    import onnx

NOTHING = "no covariance and no matrix square root"
# Operators of an iteration beside its products: arithmetic, what changes shapes, and what keeps
# iterates in one tensor.
_PASSED = {"Mul", "Div", "Add", "Sub", "Neg", "Cast"}
_PASSED |= {"Reshape", "Unsqueeze", "Squeeze", "Expand", "Identity"}
_PASSED |= {"Gather", "Slice", "Concat", "ScatterElements", "ScatterND"}
_MOVED = {"Reshape", "Cast", "Slice", "Unsqueeze", "Squeeze"}  # between `TopK` and `Gather`


@dataclass(frozen=True)
class Root:
    """A matrix square root: the steps N of its Newton-Schulz iteration, and the matrix products that they take."""

    steps: int
    products: int


@dataclass(frozen=True, order=True)
class Mixture:
    """K `chosen` of N `components`, whose weights are gathered."""

    chosen: int
    components: int


@dataclass(frozen=True)
class SecondOrder:
    """The covariances, the second moments of maps that are not centered, the roots and mixtures of a graph."""

    covariances: int
    moments: int
    roots: tuple[Root, ...]
    mixtures: tuple[Mixture, ...]

    def describe(self) -> str:
        """Describe the parts on one line; "" if there are none."""
        parts = []
        if self.covariances:
            parts.append(amount(self.covariances, "covariance"))
        if self.moments:
            parts.append(amount(self.moments, "second moment"))

        for root, count in Counter(self.roots).items():
            products = amount(root.products, "matrix product")
            times = f" ({count} times)" if count > 1 else ""
            parts.append(f"Newton-Schulz N = {root.steps} as {products}{times}")
        parts += [
            f"K = {mixture.chosen} of {mixture.components} components gathered"
            for mixture in self.mixtures
        ]
        return ", ".join(parts)


def count_second_order(model: "onnx.ModelProto") -> SecondOrder:
    """Count the second-order parts of the graph of *model*."""
    graph = _Graph(model)

    # A covariance is a product of a map with itself; what follows it may be an iteration.
    num_centered = 0
    num_moments = 0
    roots: dict[str, Root] = {}
    for node in model.graph.node:
        factor = graph.own_factor(node)
        if factor is None:
            continue
        if graph.is_centered(factor):
            num_centered += 1
        else:
            num_moments += 1
        # Products that are added up before an iteration have the same roots.
        roots |= graph.find_roots(node.output[0])

    mixtures = {mixture for node in model.graph.node if (mixture := graph.find_mixture(node))}
    return SecondOrder(
        num_centered, num_moments, tuple(roots.values()), tuple(sorted(mixtures))
    )


class _Graph:
    """Access to the nodes and constants of a model by the names of their values."""

    def __init__(self, model: "onnx.ModelProto") -> None:
        self.nodes = model.graph.node
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

        # The values that no pixel changes. Sizes do not depend on pixels.
        self.fixed = {"", *self.constants}  # "" is an operand that is left out
        for node in self.nodes:  # in topological order
            if node.op_type in ("Shape", "Size") or self.fixed.issuperset(node.input):
                self.fixed.update(node.output)

    def own_factor(self, node: "onnx.NodeProto") -> str | None:
        """Return the value that *node* multiplies with its own transpose; None for another node."""
        if node.op_type != "MatMul":
            return None
        for value, other in (tuple(node.input), tuple(reversed(node.input))):
            before = self.producer.get(other)
            if before is not None and _transposes(before) and before.input[0] == value:
                return value
        return None

    def is_centered(self, value: str) -> bool:
        """Tell whether *value* is a map minus its mean, which a factor may scale."""
        node = self.producer.get(value)
        while node is not None and node.op_type in ("Mul", "Div", "Cast"):
            node = self.producer.get(node.input[0])
        if node is None or node.op_type != "Sub":
            return False
        mean = self.producer.get(node.input[1])
        return mean is not None and mean.op_type == "ReduceMean"

    def find_roots(self, covariance: str) -> dict[str, Root]:
        """Count the iterations that follow *covariance*, each by the name of its first difference T."""
        signs = {covariance: 1}  # of what the covariance gives, as a multiple of an iterate
        unused: dict[str, set[str]] = {covariance: set()}  # differences that a value holds
        used: dict[str, set[str]] = {covariance: set()}  # those that products before it used
        first: dict[str, str] = {}  # of each difference: the first one of its iteration
        steps = set[str]()
        products: Counter[str] = Counter()
        for node in self.nodes:  # in topological order
            iterates = [name for name in node.input if name in signs]
            others = [name for name in node.input if name not in signs]
            if not iterates:
                continue
            result = node.output[0]
            held = set[str]().union(*(unused[name] for name in iterates))
            before = set[str]().union(*(used[name] for name in iterates))

            # A product uses the differences that its factors hold. One factor may be the identity.
            if node.op_type == "MatMul":
                steps |= held
                if self.fixed.issuperset(others) and self.own_factor(node) is None:
                    before |= {first[difference] for difference in held}
                    if not others:
                        products.update(before)
                    signs[result] = 1
                    unused[result] = set()
                    used[result] = before
                continue

            if node.op_type not in _PASSED:
                continue
            sign = signs[iterates[0]]

            # A negative factor turns a sum into a difference, and a difference into a sum.
            if node.op_type == "Neg":
                sign = -sign
            if node.op_type in ("Mul", "Div") and self._is_negative(others):
                sign = -sign

            if node.op_type in ("Add", "Sub") and self._is_matrix(others):
                if (node.op_type == "Add") == (sign < 0):
                    first[result] = min(before, default=result)
                    held.add(result)
                sign = 1
            signs[result] = sign
            unused[result] = held
            used[result] = before

        counts = Counter(first[step] for step in steps)
        return {name: Root(count, products[name]) for name, count in counts.items()}

    def _is_matrix(self, operands: Sequence[str]) -> bool:
        """Tell whether *operands* are one fixed value of several elements."""
        if len(operands) != 1 or operands[0] not in self.fixed:
            return False
        constant = self.constants.get(operands[0])
        return constant is None or math.prod(constant.dims) > 1

    def _is_negative(self, operands: Sequence[str]) -> bool:
        """Tell whether *operands* are one negative number."""
        number = self._number(operands[0]) if len(operands) == 1 else None
        return number is not None and number < 0

    def find_mixture(self, node: "onnx.NodeProto") -> Mixture | None:
        """Return the mixture whose weights *node* gathers; None for another node."""
        if node.op_type != "Gather" or node.input[0] not in self.constants:
            return None

        # Back to `TopK`, whose largest values a `Slice` may cut.
        chosen = None
        before = self.producer.get(node.input[1])
        while before is not None and before.op_type in _MOVED:
            if before.op_type == "Slice":
                chosen = self._number(before.input[2])
            before = self.producer.get(before.input[0])
        if before is None or before.op_type != "TopK":
            return None

        if chosen is None:
            chosen = self._number(before.input[1])
        components = self.constants[node.input[0]].dims[0]
        return None if chosen is None else Mixture(int(chosen), components)

    def _number(self, name: str) -> float | None:
        """Read a constant of one number; None for another value."""
        import onnx.numpy_helper  # noqa: PLC0415 # a server runs without it

        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) != 1:  # a graph may lack its large values
            return None
        return float(onnx.numpy_helper.to_array(tensor).item())


def _transposes(node: "onnx.NodeProto") -> bool:
    """Tell whether *node* exchanges the last two axes, and no others."""
    if node.op_type != "Transpose":
        return False
    permutation = [list(attribute.ints) for attribute in node.attribute]
    if len(permutation) != 1:
        return False
    axes = list(range(len(permutation[0])))
    return permutation[0] == [*axes[:-2], axes[-1], axes[-2]]
