"""Read, match and edit ONNX graphs.

A rule matches operators and constants, never layers or names. Whatever else a network computes is an operator
that the pattern does not contain, and every reader of a value is an edge of the graph. Rules keep two
conventions: a value keeps its name only if it keeps its meaning, and a replaced value is replaced for all of
its readers. Operators that nothing reads any more are removed.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from sopdeploy.bundle.onnx_root import onnx_root

ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Elu", "Exp", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"}
    | {"Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh"}
)
SHAPING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
ARITHMETIC: dict[str, Callable[..., int]] = {
    "Add": operator.add, "Max": max, "Min": min, "Mul": operator.mul, "Sub": operator.sub,
}  # fmt: skip
RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
CONSTANT = "constant"  # the key of the content of a computed constant in `Value.meta`
REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


class Graph:
    """The graph of *model* with the shapes of its values; `made` are the operators that rules have added."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.root = onnx_root(model)
        self.ir = ir.from_proto(model)
        self.graph = self.ir.graph
        self.made: set[ir.Node] = set()
        self.names = itertools.count()
        self.infer_shapes()
        for node in self.graph:  # the converter does not fold large constants
            known = all(given is None or is_constant(given) for given in node.inputs)
            if node.inputs and known and not node.op_type.startswith(RANDOM):
                node.outputs[0].meta[CONSTANT] = None

    def infer_shapes(self) -> None:
        """Compute the shapes of all values."""
        ShapeInferencePass(strict_mode=False)(self.ir)

    def to_proto(self) -> onnx.ModelProto:
        """Return the model without the shapes of inner values, which every reader infers."""
        proto: onnx.ModelProto = ir.to_proto(self.ir)
        del proto.graph.value_info[:]
        return proto

    def nodes(self) -> list[ir.Node]:
        """List the operators in the order of computation."""
        return list(self.graph)

    def before(self, node: ir.Node) -> "Builder":
        """Insert operators ahead of *node*."""
        return Builder(self, node)

    def constant(self, name: str, content: ArrayLike, like: ir.Value) -> ir.Value:
        """Add a constant; floats get the type of *like*. An equal constant is shared."""
        array = np.asarray(content)
        if array.dtype.kind == "f" and like.dtype is not None:
            array = array.astype(like.dtype.numpy())
        for value in self.graph.initializers.values():
            known = value.const_value
            same = known.shape == array.shape and known.dtype == ir.DataType.from_numpy(array.dtype)
            if same and known.numpy().tobytes() == array.tobytes():
                return value
        while name in self.graph.initializers:
            name += "_folded"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace *old* by *new* for every reader; *new* takes the name of *old*."""
        name, old.name = old.name, f"{old.name}/before"
        new.name, new.type, new.shape = name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def remove_unused(self) -> list[str]:
        """Remove the operators and constants that nothing reads; list the results of the operators."""
        removed = []
        for node in reversed(self.nodes()):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                removed.append(str(node.outputs[0].name).removesuffix("/before"))
                self.graph.remove(node, safe=True)
                self.made.discard(node)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        return removed[::-1]


class Builder:
    """Inserts operators into *graph* ahead of *node*, with one method for each operator: `op.MatMul(a, b)`.

    Inputs that are not values become constants: floats of the type of the first value, integers int64.
    """

    def __init__(self, graph: Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def __getattr__(self, kind: str) -> Callable[..., ir.Value]:
        """Return a function that inserts an operator and returns its first result."""
        return lambda *inputs, **attributes: self.insert(kind, inputs, attributes)

    def insert(
        self, kind: str, inputs: tuple[Any, ...], attributes: dict[str, Any], outputs: int = 1
    ) -> ir.Value:
        """Insert an operator; return its first result."""
        first = next(given for given in inputs if isinstance(given, ir.Value))
        name = f"{self.node.outputs[0].name}/{kind}_{next(self.graph.names)}"
        values = [
            given
            if isinstance(given, ir.Value) or given is None
            else self.graph.constant(f"{name}/{i}", given, first)
            for i, given in enumerate(inputs)
        ]
        node = ir.node(kind, values, attributes, num_outputs=outputs)
        for position, value in enumerate(node.outputs):
            value.name = name if position == 0 else f"{name}/result_{position}"
        node.outputs[0].type = ir.TensorType(ir.DataType(attributes["to"])) if kind == "Cast" else first.type
        self.graph.graph.insert_before(self.node, node)
        self.graph.made.add(node)
        return node.outputs[0]

    def copy(self, node: ir.Node, *inputs: ir.Value | None) -> ir.Value:
        """Insert a copy of *node* that reads *inputs*; the rows of a copied Reshape follow those it reads."""
        if node.op_type == "Reshape" and rows_factor(node) is not None:
            return self.insert("Reshape", (inputs[0], any_rows(node)), {"allowzero": 1})
        return self.insert(
            node.op_type, inputs, {name: given.value for name, given in node.attributes.items()}
        )

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Insert a Reshape to constant sizes."""
        return self.insert("Reshape", (value, np.array(sizes)), {"allowzero": 1})


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes *value*, if it is one of *operators* (any, if none is given)."""
    node = None if value is None else value.producer()
    known = node is not None and node.domain == "" and node.op_type in (operators or {node.op_type})
    return node if known else None


def only_reader(value: ir.Value, *operators: str) -> ir.Node | None:
    """Return the only node that reads *value*, if it is one of *operators* (any, if none is given)."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node if uses[0].node.op_type in (operators or {uses[0].node.op_type}) else None


def is_constant(value: ir.Value | None) -> bool:
    """Return whether *value* is a constant, or computed from constants only."""
    return (
        value is not None
        and not value.is_graph_input()
        and (value.is_initializer() or CONSTANT in value.meta)
    )


def content(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the content of *value* if it is a constant."""
    if value is None or not is_constant(value):
        return None
    if value.is_initializer():
        return value.const_value.numpy()
    if value.meta[CONSTANT] is None:
        node = value.producer()
        names = [given.name for given in node.inputs if given is not None]
        evaluator = ReferenceEvaluator(ir.to_proto(node))
        operands = [content(given) for given in node.inputs if given is not None]
        value.meta[CONSTANT] = evaluator.run(None, dict(zip(names, operands, strict=True)))[0]
    return value.meta[CONSTANT]


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that the constant *value* holds; None if it holds several or is no constant."""
    array = content(value) if is_constant(value) and set(dims(value)) <= {1} else None
    return None if array is None or array.size != 1 else float(array.reshape(()))


def dims(value: ir.Value | None) -> list[int | None]:
    """List the sizes of *value*; None where a size depends on the batch. Empty if the rank is unknown."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else None for size in value.shape]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute of *node*."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def axes(node: ir.Node) -> list[int]:
    """List the axes of a reduction, Squeeze or Unsqueeze, counted from 0; all axes if it names none."""
    rank = len(dims(node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]))
    given = content(node.inputs[1]) if len(node.inputs) > 1 else None
    return sorted(int(axis) % rank for axis in (range(rank) if given is None else given)) if rank else []


def permutation(node: ir.Node | None) -> list[int]:
    """Return the order of axes of a Transpose."""
    return [] if node is None else list(attribute(node, "perm", range(len(dims(node.inputs[0])))[::-1]))


def per_row(value: ir.Value) -> int | None:
    """Return the number of elements of each row of *value*, along its first axis; None if it is unknown."""
    sizes = [size for size in dims(value)[1:] if size is not None]
    return int(np.prod(sizes)) if dims(value) and len(sizes) == len(dims(value)) - 1 else None


def any_rows(node: ir.Node) -> NDArray[np.int64]:
    """Return the sizes that a Reshape makes, with -1 for its first axis."""
    return np.array([-1, *content(node.inputs[1])[1:]], np.int64)


def rows_factor(node: ir.Node) -> float | None:
    """Return the number of rows that a Reshape makes of one row; None if it is unknown.

    The converter writes -1 for the first axis if the batch size varies, and a number if it is fixed.
    """
    target, before = content(node.inputs[1]), per_row(node.inputs[0])
    if target is None or len(target) == 0 or (target[1:] < 1).any() or not before:
        return None
    fixed = target[0] > 0 and dims(node.inputs[0])[0] is not None
    return before / int(np.prod(target[1:])) if target[0] == -1 or fixed else None


def is_row_wise(node: ir.Node) -> bool:
    """Return whether row i of the result depends only on row i of the operands and on constants."""
    kind, value, rank = node.op_type, node.inputs[0], len(dims(node.outputs[0]))
    if node.domain or not dims(value):
        return False
    if kind in ELEMENTWISE or (kind == "MatMul" and rank >= 3):
        return all(
            len(dims(given)) < rank or dims(given)[0] == 1
            if content(given) is not None
            else len(dims(given)) == rank
            for given in node.inputs
            if given is not None
        )
    if kind in REDUCTIONS:
        return 0 not in axes(node) and (len(node.inputs) == 1 or content(node.inputs[1]) is not None)
    if kind in {"Squeeze", "Unsqueeze"}:
        return 0 not in axes(node)
    if kind == "Transpose":
        return permutation(node)[0] == 0
    if kind == "Softmax":
        return attribute(node, "axis", -1) % rank != 0
    if kind == "Gather":
        return attribute(node, "axis", 0) % len(dims(value)) != 0 and content(node.inputs[1]) is not None
    return kind == "Reshape" and rows_factor(node) == 1


def integers(value: ir.Value | None) -> list[int | None] | None:
    """Compute the integers that *value* holds from the shapes of the graph; None for each unknown one."""
    array = content(value)
    if array is not None:
        return (
            [int(number) for number in array.reshape(-1)]
            if array.dtype.kind in "iu" and array.size < 16
            else None
        )
    node = producer(value, "Shape", "Gather", "Concat", *SHAPING, *ARITHMETIC)
    if node is None:
        return None
    if node.op_type == "Shape":
        sizes = dims(node.inputs[0])
        return sizes[attribute(node, "start", 0) : attribute(node, "end", len(sizes))]
    operands = [integers(given) for given in node.inputs[: 1 if node.op_type in SHAPING else None]]
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands):
        return None
    if node.op_type == "Gather":
        return [None if place is None else known[0][place] for place in known[1]]
    if node.op_type in ARITHMETIC:
        pairs = zip(*known, strict=False)
        return [None if None in pair else ARITHMETIC[node.op_type](*pair) for pair in pairs]
    return [number for operand in known for number in operand]
