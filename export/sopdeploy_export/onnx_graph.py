"""Read and edit ONNX graphs.

A rule matches operators and constants, never layers or names. Whatever else a network computes is an operator
that the pattern does not contain, and every reader of a value is an edge of the graph. Rules keep two
conventions: a value keeps its name only if it keeps its meaning, and a replaced value is replaced for all of
its readers. Operators that nothing reads any more are removed.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript.rewriter.pattern import Pattern

from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.errors import LoweringError

ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Exp", "Identity", "Mul", "Neg", "Pow", "Relu", "Sqrt", "Sub"}
)
_REDUCTIONS = frozenset({"ReduceL2", "ReduceMean", "ReduceSum"})
RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
GROWING = ("ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile")
_MOST_NUMBERS = 2**26  # of a constant that is computed
CONSTANT = "constant"  # the key of the content of a computed constant in `Value.meta`
REPLACED = "/before"  # ends the name of a value whose readers now read another one
_ROWS = "rows"  # the key of the result of `rows`


class Rewrite(NamedTuple):
    """What a rule proposes: *new* instead of *old*, whatever the *inputs* of both are."""

    old: ir.Value
    new: ir.Value
    inputs: tuple[ir.Value, ...]
    precondition: str
    effect: str


class Graph:
    """The graph of *model* with the shapes of its values; `made` are the operators that rules have added."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.root = onnx_root(model)
        self.ir = ir.from_proto(model)
        self.graph = self.ir.graph
        self.made: set[ir.Node] = set()
        self.names = itertools.count()
        self.infer_shapes()
        for node in self.graph:
            if node.op_type == "Tile" and repeats_per_image(node):  # ONNX does not infer its shape
                node.outputs[0].shape = ir.Shape([None, *dims(node.inputs[0])[1:]])
        self.infer_shapes()
        for node in self.graph:
            given = node.inputs[0] if node.inputs else None
            if given is not None and is_constant(given) and node.op_type in {"ConstantOfShape", "EyeLike"}:
                sizes = content(given) if node.op_type == "ConstantOfShape" else given.shape
                node.outputs[0].shape = (
                    None if sizes is None else ir.Shape(sizes)
                )  # ONNX knows no `static_size`
            size = static_size(node)
            if size is not None:
                node.outputs[0].meta[CONSTANT] = size
            elif computes_constant(node):
                node.outputs[0].meta[CONSTANT] = None  # computed when a rule reads it

    def infer_shapes(self) -> None:
        """Compute the shapes of all values, and which first axes are multiples of the batch size."""
        ShapeInferencePass(strict_mode=False)(self.ir)
        for node in self.graph:
            for value in node.outputs:
                value.meta[_ROWS] = infer_rows(node, value)

    def regions(self, rewrite: Rewrite) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """Cut *rewrite* out of the graph: two models that compute its old and its new value from its inputs.

        The operand of a Shape is an input too, unless the models compute it. Raises `LoweringError` if a
        model reads another value of an image, or if the batch size of an input is unknown.
        """
        inputs = list(rewrite.inputs)
        parts = [self._nodes_between(inputs, value) for value in (rewrite.old, rewrite.new)]
        inside = {value for nodes in parts for node in nodes for value in node.outputs}
        for node in parts[0] | parts[1]:
            if node.op_type == "Shape" and node.inputs[0] not in {*inside, *inputs}:
                inputs.append(operand(node, 0))
        if len({rows(value) for value in inputs} - {(1, None)}) > 1 or None in map(rows, inputs):
            raise LoweringError("the inputs of the region have different batch sizes")
        before, after = (
            self._model(nodes, inputs, value)
            for nodes, value in zip(parts, (rewrite.old, rewrite.new), strict=True)
        )
        return before, after

    def _nodes_between(self, inputs: Sequence[ir.Value], output: ir.Value) -> set[ir.Node]:
        nodes: set[ir.Node] = set()
        unread: list[ir.Value | None] = [output]
        while unread:
            value = unread.pop()
            if value is None or value in inputs or is_constant(value):
                continue
            node = value.producer()
            if node is None:
                raise LoweringError(f"the region reads {value.name}")
            if node not in nodes:
                nodes.add(node)
                unread += () if node.op_type == "Shape" else node.inputs
        return nodes

    def _model(self, nodes: set[ir.Node], inputs: Sequence[ir.Value], output: ir.Value) -> onnx.ModelProto:
        """Make a model of *nodes* and the constants that they read, from *inputs* to *output*."""
        constants = {
            str(value.name): ir.tensor(np.asarray(content(value)), name=value.name)
            for node in nodes
            for value in node.inputs
            if value is not None and value not in inputs and is_constant(value)
        }
        described = []
        for value in inputs:
            sizes: list[int | str | None] = [*dims(value)]
            if sizes and rows(value) != (sizes[0], None):  # the first size is not fixed
                sizes[0] = "batch"
            described.append(
                onnx.helper.make_tensor_value_info(str(value.name), int(value.dtype or 0), sizes)
            )
        result = onnx.helper.make_tensor_value_info(str(output.name), int(output.dtype or 0), None)
        ordered = [ir.to_proto(node) for node in self.graph if node in nodes]
        weights = [ir.to_proto(tensor) for tensor in constants.values()]
        graph = onnx.helper.make_graph(ordered, "region", described, [result], weights)
        opsets = [onnx.helper.make_opsetid(*opset) for opset in self.ir.opset_imports.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self.ir.ir_version)

    def to_proto(self) -> onnx.ModelProto:
        """Return the model without the shapes of inner values, which every reader infers."""
        proto: onnx.ModelProto = ir.to_proto(self.ir)
        del proto.graph.value_info[:]
        return proto

    def nodes(self) -> list[ir.Node]:
        """List the operators in the order of computation."""
        return list(self.graph)

    def match(self, pattern: Pattern, node: ir.Node) -> dict[str, ir.Value]:
        """Return the values that *pattern* names, by name, if it ends in *node*; otherwise an empty dict."""
        match = pattern.match(self.ir, self.graph, node, check_nodes_are_removable=False)
        return dict(match.bindings) if match else {}

    def constant(self, name: str, array: ArrayLike, like: ir.Value) -> ir.Value:
        """Add a constant; floats get the type of *like*. An equal constant is shared."""
        array = np.asarray(array)
        if array.dtype.kind == "f" and like.dtype is not None:
            array = array.astype(like.dtype.numpy())
        for value in self.graph.initializers.values():
            other = value.const_value
            if other is None or other.shape != array.shape or other.dtype.numpy() != array.dtype:
                continue
            if other.numpy().tobytes() == array.tobytes():
                return value
        while name in self.graph.initializers:
            name += "_folded"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace *old* by *new* for every reader; *new* takes the name of *old*."""
        name, old.name = old.name, f"{old.name}{REPLACED}"
        new.name, new.type, new.shape = name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def remove_unused(self) -> list[str]:
        """Remove the operators and constants that nothing reads; list the results of the operators."""
        removed = []
        for node in reversed(self.nodes()):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                removed.append(name_of(node).removesuffix(REPLACED))
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
        return lambda *inputs, **attributes: self.insert(kind, inputs, attributes).outputs[0]

    def insert(
        self, kind: str, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int = 1
    ) -> ir.Node:
        """Insert the operator *kind* ahead of `node` and return it.

        `None` leaves an optional input out. The first output has the type of the first value of *inputs*,
        that of a Cast its attribute `to`.
        """
        name = f"{name_of(self.node)}/{kind}_{next(self.graph.names)}"
        first_value = next(operand for operand in inputs if isinstance(operand, ir.Value))
        values = [
            operand
            if isinstance(operand, ir.Value) or operand is None
            else self.graph.constant(f"{name}/{i}", operand, first_value)
            for i, operand in enumerate(inputs)
        ]
        node = ir.node(kind, values, attributes, num_outputs=outputs)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}/result_{i}"
        is_cast = kind == "Cast"
        node.outputs[0].type = ir.TensorType(ir.DataType(attributes["to"])) if is_cast else first_value.type
        self.graph.graph.insert_before(self.node, node)
        self.graph.made.add(node)
        return node

    def copy(self, node: ir.Node, *inputs: ir.Value | None) -> ir.Value:
        """Insert a copy of *node* that reads *inputs*; a Reshape keeps any number of rows."""
        sizes = content(node.inputs[1]) if node.op_type == "Reshape" else None
        if sizes is not None:
            return self.Reshape(inputs[0], np.array([-1, *sizes[1:]]), allowzero=1)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self.insert(node.op_type, inputs, attributes).outputs[0]

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Insert a Reshape to constant sizes."""
        return self.Reshape(value, np.array(sizes), allowzero=1)


def name_of(node: ir.Node) -> str:
    """Return the name of the first result of *node*."""
    return str(node.outputs[0].name)


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return input *index* of *node*, which its operator requires."""
    value = node.inputs[index]
    if value is None:
        raise LoweringError(f"{name_of(node)}: input {index} is missing")
    return value


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes *value*, if it is one of *operators* (any, if none is given)."""
    node = None if value is None else value.producer()
    if node is None or node.domain or (operators and node.op_type not in operators):
        return None
    return node


def repeats_per_image(tile: ir.Node) -> bool:
    """Return whether *tile* repeats its input along the first axis only."""
    counts = producer(tile.inputs[1], "Concat")
    others = [content(given) for given in counts.inputs[1:]] if counts is not None else []
    return bool(others) and all(array is not None and bool((array == 1).all()) for array in others)


def static_size(node: ir.Node) -> NDArray[np.int64] | None:
    """Return the sizes that *node* reads from a Shape, if they do not depend on the batch."""
    shape = producer(node.inputs[0], "Shape") if node.op_type == "Gather" else None
    if shape is None:
        return None
    sizes, index = dims(shape.inputs[0])[attribute(shape, "start", 0) :], content(node.inputs[1])
    if index is None or index.ndim != 0 or index >= len(sizes) or sizes[int(index)] is None:
        return None
    return np.array(sizes[int(index)])


def computes_constant(node: ir.Node) -> bool:
    """Return whether *node* reads constants only, always computes the same, and not too many numbers."""
    reads_constants = all(is_constant(value) for value in node.inputs if value is not None)
    if not node.inputs or not reads_constants or node.op_type.startswith(RANDOM):
        return False
    sizes = [dims(value) for value in node.outputs if value.shape is not None]
    known = bool(sizes) and None not in sizes[0]
    return (
        math.prod(size or 0 for size in sizes[0]) <= _MOST_NUMBERS if known else node.op_type not in GROWING
    )


def is_constant(value: ir.Value | None) -> bool:
    """Return whether *value* is a constant, or computed from constants only."""
    if value is None or value.is_graph_input():
        return False
    return value.is_initializer() or CONSTANT in value.meta


def content(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the content of *value* if it is a constant."""
    if value is None or not is_constant(value):
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if value.meta[CONSTANT] is None and node is not None:
        feeds = {str(operand.name): content(operand) for operand in node.inputs if operand is not None}
        results = list(ReferenceEvaluator(ir.to_proto(node)).run(None, feeds))
        value.meta[CONSTANT] = np.asarray(results[0])
    array: NDArray[Any] = value.meta[CONSTANT]
    return array


def square(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the square matrix that the constant *value* holds, without leading axes of size 1."""
    array = content(value)
    if array is None or array.ndim < 2 or array.shape[-1] ** 2 != array.size:
        return None
    side = array.shape[-1]
    return array.reshape(side, side) if array.shape[-2] == side else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that the constant *value* holds; None if it holds several or is no constant."""
    array = content(value) if set(dims(value)) <= {1} else None
    return None if array is None or array.size != 1 else float(array.item())


def dims(value: ir.Value | None) -> list[int | None]:
    """List the sizes of *value*; None where a size depends on the batch. Empty if the rank is unknown."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else None for size in value.shape]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute of *node*."""
    return node.attributes[name].value if name in node.attributes else default


def axes(node: ir.Node) -> list[int]:
    """List the axes of a reduction or Unsqueeze, counted from 0; all axes if *node* lists none.

    Empty if the rank is unknown or 0.
    """
    rank = len(dims(node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]))
    if not rank:
        return []
    listed = content(node.inputs[1]) if len(node.inputs) > 1 else None
    if listed is None or not listed.size:
        return list(range(rank))
    return sorted(int(axis) % rank for axis in listed)


def per_row(value: ir.Value | None) -> int | None:
    """Return the number of elements of each row of *value*, along its first axis; None if it is unknown."""
    sizes = [size for size in dims(value)[1:] if size is not None]
    return int(np.prod(sizes)) if dims(value) and len(sizes) == len(dims(value)) - 1 else None


def rows_factor(node: ir.Node) -> float | None:
    """Return the number of rows that a Reshape makes of one row; None if it is unknown.

    The converter writes -1 for the first axis if the batch size varies, and a number if it is fixed.
    """
    sizes, before = content(node.inputs[1]), per_row(node.inputs[0])
    if sizes is None or len(sizes) == 0 or (sizes[1:] < 1).any() or not before:
        return None
    fixed = sizes[0] > 0 and dims(node.inputs[0])[0] is not None
    return before / int(np.prod(sizes[1:])) if sizes[0] == -1 or fixed else None


def rows(value: ir.Value | None) -> tuple[float, str | None] | None:
    """Return the length of the first axis: a number, and the batch that it is multiplied by, if there is one.

    None if it is unknown. Two values whose other sizes are equal have one shape only if this is equal, too.
    """
    if value is None or not value.shape:
        return None
    first = value.shape[0]
    if isinstance(first, int):
        return first, None
    return (1, str(first)) if value.is_graph_input() else value.meta.get(_ROWS)


def infer_rows(node: ir.Node, value: ir.Value) -> tuple[float, str | None] | None:
    """Compute the `rows` of *value*, a result of *node*, from those of its operands."""
    rank, first = len(dims(value)), value.shape[0] if value.shape else None
    if node.op_type == "Reshape" and rows(node.inputs[0]) is not None:
        factor, known = rows_factor(node), rows(node.inputs[0])
        return None if factor is None or known is None else (factor * known[0], known[1])
    if node.op_type in {"Expand", "Tile"}:
        sizes, given = producer(node.inputs[1], "Concat", "Shape"), node.inputs[0]
        shape = (
            producer(sizes.inputs[0], "Shape") if sizes is not None and sizes.op_type == "Concat" else sizes
        )
        starts = shape is not None and attribute(shape, "start", 0) == 0
        reads_rows = shape is not None and starts and (shape is sizes or attribute(shape, "end", 0) == 1)
        known = rows(shape.inputs[0]) if shape is not None and reads_rows else None
        once = len(dims(given)) < rank or dims(given)[:1] == [1]
        return known if once or (node.op_type == "Expand" and rows(given) == known) else None
    if node.op_type == "Slice" and len(node.inputs) > 3:
        over = content(node.inputs[3])
        return rows(node.inputs[0]) if over is not None and bool((over > 0).all()) else None
    varying = [given for given in node.inputs if len(dims(given)) == rank and dims(given)[:1] != [1]]
    if node.op_type in ELEMENTWISE | {"Softmax"} or (node.op_type == "MatMul" and rank >= 3):
        found = {rows(given) for given in varying}
        return found.pop() if len(found) == 1 else None
    same = (given for given in node.inputs if given is not None and given.shape and given.shape[0] == first)
    return rows(next(same, None)) if isinstance(first, ir.SymbolicDim) and first.value is not None else None


def is_row_wise(node: ir.Node) -> bool:
    """Return whether row i of the result depends only on row i of the operands and on constants."""
    kind, operands = node.op_type, [value for value in node.inputs if value is not None]
    rank, rank_before = len(dims(node.outputs[0])), len(dims(node.inputs[0]))
    if node.domain or not rank_before:
        return False
    if kind in ELEMENTWISE or (kind == "MatMul" and rank >= 3):
        constants = [value for value in operands if is_constant(value)]
        shared_by_rows = all(len(dims(value)) < rank or dims(value)[0] == 1 for value in constants)
        return shared_by_rows and all(
            len(dims(value)) == rank for value in operands if not is_constant(value)
        )
    if kind in _REDUCTIONS:
        return 0 not in axes(node) and all(is_constant(value) for value in operands[1:])
    if kind == "Transpose":
        return bool(attribute(node, "perm", [1])[0] == 0)
    if kind == "Gather":
        return attribute(node, "axis", 0) % rank_before != 0 and is_constant(node.inputs[1])
    return kind == "Reshape" and rows_factor(node) == 1
