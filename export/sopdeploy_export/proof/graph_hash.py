"""A Merkle hash over a captured graph: equal roots mean equal graphs with equal weights.

The graph is walked from its outputs up. The hash of an operation covers its name, every argument of its
schema with defaults filled in, and the hashes of its operands in order; weights and constants go in by
content, inputs by position, type and (symbolic) shape. Names, and whatever no output depends on, do not
count, so a network that was trained with branches has the root of the plain one exactly if its answer is
computed the same way. The walk is linear, and complete because operands are ordered.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from sopdeploy.errors import CertificateError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramRoot:
    """The root of a graph and what lies under it.

    `nodes` maps the hash of every operation that counts to where it stands in the network; `state` holds
    the names of the weights and buffers that the outputs depend on.
    """

    sha256: str
    nodes: dict[str, str]
    state: frozenset[str]


def program_root(program: ExportedProgram) -> ProgramRoot:
    """Return the root of *program*; raises `CertificateError` where its graph writes to anything."""
    refuse_writes(program)
    walk = Walk(leaves=leaf_hashes(program))
    outputs = next(node for node in program.graph.nodes if node.op == "output")
    effects = [node for node in program.graph.nodes if node.op == "call_function" and is_effect(node)]
    lines = [walk.encode(outputs.args[0]), *(walk.encode(node) for node in effects)]
    names = dict(program.graph_signature.inputs_to_parameters)
    names |= program.graph_signature.inputs_to_buffers
    reached = frozenset(names[node.name] for node in walk.hashes if node.name in names)
    return ProgramRoot(sha256=hash_of(lines), nodes=walk.places, state=reached)


def refuse_writes(program: ExportedProgram) -> None:
    """Refuse a graph that writes to a buffer or to its input: its answers would depend on its past."""
    for spec in program.graph_signature.output_specs:
        if spec.kind not in {OutputKind.USER_OUTPUT}:
            raise CertificateError(
                f"the eval graph writes to {spec.target or spec.arg}; a network that ships only computes"
            )


def is_effect(node: fx.Node) -> bool:
    """Say whether *node* does something although nobody uses what it gives, such as an assertion."""
    return not node.users and node.is_impure()


def leaf_hashes(program: ExportedProgram) -> dict[str, str]:
    """Return the hash of every placeholder: weights by content, inputs by position and shape."""
    symbols: dict[str, str] = {}
    leaves = {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for position, spec in enumerate(
        s for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT
    ):
        value = values[spec.arg.name]
        if not isinstance(value, Tensor):
            raise CertificateError(f"input {position} is no tensor")
        shape = [symbol(size, symbols) for size in value.shape]
        leaves[spec.arg.name] = hash_of(["input", str(position), str(value.dtype), *shape])
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if not isinstance(tensor, Tensor):
            raise CertificateError(f"{spec.target}: the graph depends on an object that is no tensor")
        leaves[spec.arg.name] = tensor_hash(tensor)
    return leaves


def symbol(size: Any, symbols: dict[str, str]) -> str:
    """Return a size as text: a number, or a symbol numbered by its first appearance."""
    if isinstance(size, int):
        return str(size)
    return symbols.setdefault(str(size.node.expr), f"S{len(symbols)}")


def tensor_hash(tensor: Tensor) -> str:
    """Return the sha256 over type, shape and content of *tensor*, in the standard memory layout."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(header + content.tobytes()).hexdigest()


def hash_of(lines: Iterable[str]) -> str:
    """Return the sha256 over *lines*, each with its length, so that no two lists give the same bytes."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{len(line)}:{line}".encode())
    return digest.hexdigest()


@dataclass(kw_only=True, slots=True)
class Walk:
    """One walk over one graph: hashes of nodes, and where in the network each operation stands."""

    leaves: dict[str, str]
    hashes: dict[fx.Node, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def node_hash(self, wanted: fx.Node) -> str:
        """Return the hash of *wanted*; an explicit stack, because networks are deeper than Python's."""
        stack = [wanted]
        while stack:
            node = stack[-1]
            missing = [operand for operand in node.all_input_nodes if operand not in self.hashes]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if node not in self.hashes:
                self.hashes[node] = self.own_hash(node)
        return self.hashes[wanted]

    def own_hash(self, node: fx.Node) -> str:
        """Return the hash of *node*, whose operands have theirs."""
        if node.op == "placeholder":
            return self.leaves[node.name]
        if node.op == "get_attr":
            return self.attribute_hash(node)
        if node.op != "call_function":
            raise CertificateError(f"{node.name}: a graph holds operations only, not {node.op}")
        found = hash_of([operation(node), *(self.encode(value) for value in arguments(node))])
        self.places.setdefault(found, place(node))
        return found

    def attribute_hash(self, node: fx.Node) -> str:
        """Return the hash of a constant, or of a graph that a higher-order operation calls."""
        owner = node.graph.owning_module
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            return tensor_hash(value)
        if isinstance(value, fx.GraphModule):
            return subgraph_hash(value)
        raise CertificateError(f"{node.name}: the graph depends on an object that is no tensor")

    def encode(self, value: Any) -> str:
        """Return *value*, an argument of an operation, as text."""
        if isinstance(value, fx.Node):
            return self.node_hash(value)
        if isinstance(value, list | tuple):
            return hash_of(["list", *(self.encode(item) for item in value)])
        if isinstance(value, dict):
            return hash_of(["dict", *(f"{key}={self.encode(value[key])}" for key in sorted(value))])
        if isinstance(value, float):
            return f"float {value.hex()}"
        if value is None or isinstance(
            value, bool | int | str | torch.dtype | torch.device | torch.layout | torch.memory_format
        ):
            return f"{type(value).__name__} {value}"
        raise CertificateError(f"an operation takes {type(value).__name__}, which has no hash")


def subgraph_hash(module: fx.GraphModule) -> str:
    """Return the hash of a graph inside the graph: its inputs by position, from its outputs up."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    walk = Walk(leaves={n.name: hash_of(["argument", str(i)]) for i, n in enumerate(placeholders)})
    outputs = next(node for node in module.graph.nodes if node.op == "output")
    return hash_of(["graph", walk.encode(outputs.args[0])])


def operation(node: fx.Node) -> str:
    """Return the full name of what *node* computes."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(target)
    return f"python {target.__module__}.{target.__qualname__}"


def arguments(node: fx.Node) -> list[Any]:
    """Return every argument of *node*, in the order of its schema, defaults filled in."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return [*node.args, dict(node.kwargs)]
    values = []
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            values.append(node.args[position])
        else:
            values.append(node.kwargs.get(argument.name, argument.default_value))
    return values


def place(node: fx.Node) -> str:
    """Return where in the network *node* stands: the module and the operation."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    where = paths[-1].removeprefix("L['self'].").removeprefix("network.") if paths else ""
    return f"{operation(node)} in {where or 'forward'}"
