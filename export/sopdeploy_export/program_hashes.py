"""Merkle hashes over a captured program; `sopdeploy.bundle.onnx_root` has those over an ONNX graph.

The root covers the outputs, and operations with an effect, such as assertions. The hash of an
operation covers its name, every argument of its schema with defaults filled in, and the hashes
of its operands in order. Weights and constants are hashed by content, inputs by position, dtype
and (symbolic) shape. Names are not hashed, nor are operations that no output depends on, nor the
memory layout of the images. So a network that was trained with branches has the root of the
plain network if and only if its output is computed the same way.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from sopdeploy.bundle.onnx_root import hash_parts
from sopdeploy.errors import CertificateError
from sopdeploy_export.network import at_line, is_network_code

MOMENTUM = 0.1
_TRAINS = ("training", "train", "use_input_stats")  # arguments of normalizations
CHECK_OF_TYPE = torch.ops.aten._assert_tensor_metadata.default
_FRAME = re.compile(r'File "(.+)", line (\d+), in ')  # of the trace that torch keeps of a node
HashOf = Callable[[Tensor], str]  # returns a hash of a tensor's type, shape and content
SCALARS = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramRoot:
    """The Merkle root of a program and what it covers.

    Attributes:
        sha256: The root.
        nodes: Maps the hash of every operation that the outputs depend on to its name and module.
        tensors: The names of the parameters and buffers that the outputs depend on.
        modules: The names of the modules that were running when these operations were captured.
    """

    sha256: str
    nodes: dict[str, str]
    tensors: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()


def tensor_hash(tensor: Tensor) -> str:
    """Compute the sha256 of dtype, shape and contiguous content of *tensor*."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(content.data)  # in place, because a weight can be large
    return digest.hexdigest()


def program_root(program: ExportedProgram, hash_of: HashOf = tensor_hash) -> ProgramRoot:
    """Compute the Merkle root of *program*; *hash_of* hashes its tensors.

    Raises `CertificateError` if the program writes to a buffer or an input, because its outputs
    would then depend on earlier calls, and if it has an operation that no proof covers, such as
    one that draws random numbers.
    """
    for spec in program.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise CertificateError(
                f"the eval graph writes to {spec.target or spec.arg}; an exported "
                "network must be stateless"
            )

    # The nodes that the outputs depend on, and operations with an effect, whose results no node
    # reads, with the nodes that these operations depend on.
    outputs = program.graph.output_node()
    needed = nodes_before(program.graph, outputs.all_input_nodes)
    side_effects = []
    for node in program.graph.nodes:
        has_no_reader = node.op == "call_function" and not node.users

        # A check of a type has no effect if no output depends on the value: the type is fixed, so
        # the check cannot fail.
        is_idle = node.target is CHECK_OF_TYPE and not needed.issuperset(node.all_input_nodes)
        if has_no_reader and node.is_impure() and not is_idle:
            side_effects.append(node)
    needed |= nodes_before(program.graph, side_effects)

    # The root covers the outputs and the effects; the hash of a node covers all nodes that it
    # depends on.
    hashes, operations = _hash_nodes(program, needed, hash_of)
    encoded = [
        _encode(value, hashes.__getitem__, hash_of)
        for value in (outputs.args[0], *side_effects)
    ]

    signature = program.graph_signature
    state_names = signature.inputs_to_parameters | signature.inputs_to_buffers  # by placeholder
    return ProgramRoot(
        sha256=hash_parts(*encoded),
        nodes=operations,
        tensors=frozenset(
            state_names[node.name] for node in hashes if node.name in state_names
        ),
        modules=frozenset(name for node in hashes for name in module_names(node)),
    )


def nodes_before(graph: fx.Graph, results: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes of *graph* that *results* depend on, and *results* themselves."""
    needed = set(results)
    for node in reversed(graph.nodes):  # a node comes before its operands
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def describe_difference(root: ProgramRoot, expected: ProgramRoot, reference: str) -> str:
    """Describe how *root* differs from *expected*, which is the root of the *reference* network."""
    # The first operation that only *root* has, and the first that only *expected* has.
    extra = next(
        (name for sha256, name in root.nodes.items() if sha256 not in expected.nodes), None
    )
    missing = next(
        (name for sha256, name in expected.nodes.items() if sha256 not in root.nodes), None
    )

    if extra is None:
        return "its inputs or outputs differ" if missing is None else f"it lacks {missing}"
    if missing is None:
        return f"it computes {extra}"
    if extra == missing:  # the same operation, with another hash
        return f"{extra} has other weights, operands or arguments than in the {reference} one"
    return f"it computes {extra}, the {reference} one {missing}"


def fingerprint(program: ExportedProgram, hash_of: HashOf = tensor_hash) -> str | None:
    """Hash every operation of *program* in order, with its operands by position, and the tensors they use.

    Two programs with equal fingerprints differ at most in names, and in tensors that nothing
    uses, so torch's passes give both the same result. Tensors are hashed by content (*hash_of*),
    kind and strides. Returns None, without an error, for a program with an argument, a subgraph
    or an operation that cannot be hashed.
    """
    # A node is known by its position: first the inputs that are used, then the operations.
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs_in_use = [
        spec
        for spec in program.graph_signature.input_specs
        if placeholders[spec.arg.name].users
    ]
    inputs_in_use = [placeholders[spec.arg.name] for spec in specs_in_use]
    operations = [node for node in program.graph.nodes if node.op != "placeholder"]
    positions = {
        node: str(position) for position, node in enumerate([*inputs_in_use, *operations])
    }

    described = [str(program.range_constraints)]
    try:
        hashes_by_placeholder = _hash_placeholders(program, hash_of)
        for spec in specs_in_use:
            stored = _stored_value(program, spec)
            strides = stored.stride() if isinstance(stored, Tensor) else ""
            sha256 = hashes_by_placeholder[spec.arg.name]
            described.append(f"{spec.kind} {spec.persistent} {strides} {sha256}")

        for node in operations:
            if node.op != "output":
                described.append(_name_operation(node))  # raises an error unless it is a call
            described.append(_encode([node.args, node.kwargs], positions.__getitem__, hash_of))
    except CertificateError:
        return None

    return hash_parts(*described)


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Compare type, shape and content; as bytes, because 0 equals -0 and NaN differs from itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first_bytes, second_bytes = (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(first_bytes, second_bytes)


class TensorHashes:
    """The sha256 of each tensor by its place in memory, computed when it is first asked for."""

    def __init__(self) -> None:
        # The tensors are kept, so that no other tensor gets their places.
        self._by_place: dict[object, tuple[Tensor, str]] = {}

    def __call__(self, tensor: Tensor) -> str:
        """Return `tensor_hash` of *tensor*, as it was at the first call."""
        place: object = id(tensor)
        if tensor.layout == torch.strided and tensor.numel():
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in self._by_place:
            self._by_place[place] = tensor, tensor_hash(tensor)
        return self._by_place[place][1]


def _hash_placeholders(program: ExportedProgram, hash_of: HashOf) -> dict[str, str]:
    """Map each placeholder to a hash: of a weight's content, or of an input's position, dtype and shape.

    Raises `CertificateError` for one that is not a tensor.
    """
    values = {
        node.name: node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder"
    }
    hashes: dict[str, str] = {}
    num_inputs = 0
    name_of_size: dict[str, str] = {}  # symbolic sizes are numbered by their first appearance

    for spec in program.graph_signature.input_specs:
        # A weight, a buffer or a constant.
        if spec.kind != InputKind.USER_INPUT:
            tensor = _stored_value(program, spec)
            if not isinstance(tensor, Tensor):
                raise CertificateError(
                    f"{spec.target}: the graph depends on an object that is not a tensor"
                )
            hashes[spec.arg.name] = hash_of(tensor)
            continue

        # An input.
        value = values[spec.arg.name]
        if not isinstance(value, Tensor):
            raise CertificateError(f"input {num_inputs} is not a tensor")
        sizes: list[Any] = list(value.shape)  # integers, or symbolic
        shape = []
        for size in sizes:
            text = str(size)
            if not isinstance(size, int):
                next_name = f"S{len(name_of_size)}"
                text = name_of_size.setdefault(str(size.node.expr), next_name)
            shape.append(text)
        hashes[spec.arg.name] = hash_parts("input", str(num_inputs), str(value.dtype), *shape)
        num_inputs += 1

    return hashes


def _stored_value(program: ExportedProgram, spec: InputSpec) -> Any:
    """Return the weight, buffer or constant that an input of *program* stands for; None for images."""
    name = spec.target or ""  # images have no name
    return program.state_dict.get(name, program.constants.get(name))


def _encode(value: Any, text_of_node: Callable[[fx.Node], str], hash_of: HashOf) -> str:
    """Encode *value*, an argument of an operation, as text.

    *text_of_node* gives the text that stands for an operand, its hash or its position; *hash_of*
    gives the hash of a tensor. Raises `CertificateError` for an argument of another type.
    """
    if isinstance(value, fx.Node):
        return text_of_node(value)
    if isinstance(value, Tensor):
        return hash_of(value)
    if isinstance(value, list | tuple):
        return hash_parts("list", *(_encode(item, text_of_node, hash_of) for item in value))
    if isinstance(value, dict):
        items = (f"{key}={_encode(value[key], text_of_node, hash_of)}" for key in sorted(value))
        return hash_parts("dict", *items)
    if isinstance(value, float):
        return f"float {value.hex()}"
    if value is None or isinstance(value, SCALARS):
        return f"{type(value).__name__} {value}"
    raise CertificateError(
        f"an operation has a {type(value).__name__} argument, which cannot be hashed"
    )


def _hash_nodes(
    program: ExportedProgram, needed: set[fx.Node], hash_of: HashOf
) -> tuple[dict[fx.Node, str], dict[str, str]]:
    """Return the hashes of the *needed* nodes, and for each hash a text with its operation and module.

    *needed* must contain the operands of each of its nodes. Raises `CertificateError` for an
    operation that no proof covers.
    """
    hashes_by_placeholder = _hash_placeholders(program, hash_of)
    hashes: dict[fx.Node, str] = {}
    operations: dict[str, str] = {}

    for node in program.graph.nodes:  # in topological order
        if node not in needed:
            continue

        if node.op == "placeholder":
            hashes[node] = hashes_by_placeholder[node.name]
        elif node.op == "get_attr":
            hashes[node] = hash_of(_get_constant(node))
        elif node.target is torch.ops.aten.clone.default and module_of(node) == "normalise":
            # `Normalize` copies the images to the layout of the network.
            hashes[node] = hashes[node.all_input_nodes[0]]
        else:
            operation = _name_operation(node)
            arguments = (
                _encode(value, hashes.__getitem__, hash_of) for value in _all_arguments(node)
            )
            hashes[node] = hash_parts(operation, *arguments)
            operations.setdefault(hashes[node], f"{operation} in {module_of(node)}")

    return hashes, operations


def _name_operation(node: fx.Node) -> str:
    """Return the name of the operation of *node*; raises `CertificateError` for one that no proof covers."""
    target: Any = node.target
    if node.op != "call_function":
        raise CertificateError(
            f"{node.name}: a graph must contain only operations, not {node.op}"
        )
    if draws(target, node.args, node.kwargs):
        place = place_of(node)
        raise CertificateError(
            f"the eval graph draws random numbers with {target}{place}; an exported network must be "
            f"deterministic: {_advise_on_draw(node, place)}"
        )
    if str(target).startswith("aten.as_strided"):
        raise CertificateError(
            f"{module_of(node)} reads memory with as_strided, whose result depends on the layout of its "
            "operand; use reshape, permute, unfold or slices"
        )
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"python {getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def operator_name(node: fx.Node) -> str:
    """Return the name of the operation of *node* without its overload."""
    return str(getattr(node.target, "overloadpacket", node.target))


def module_of(node: fx.Node) -> str:
    """Name the innermost module that *node* was captured in; "forward" is the whole network."""
    names = module_names(node)
    return names[-1] if names and names[-1] else "forward"


def place_of(node: fx.Node) -> str:
    """Write the module of *node* and the line of its code as ` in head, in net.py:12 (the line)`.

    The line is the innermost one in a `forward` of the network's own code; without one, it is left out.
    """
    place = f" in {module_of(node)}"
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, number in reversed(frames):
        if is_network_code(file):
            return f"{place},{at_line(file, int(number))}"
    return place


def module_names(node: fx.Node) -> list[str]:
    """List the modules that *node* was captured in, the outermost first; "" is the whole network."""
    names = []
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        name = str(path).removeprefix("L['self'].").removeprefix("network.")
        names.append("" if name == "network" else name)
    return names


def draws(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether *operator* draws random numbers; dropout in eval mode or with p = 0 does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False

    # All arguments by name. Attention has `dropout_p`, recurrent layers have `dropout`.
    arguments = arguments_by_name(operator, args, kwargs)
    is_off = any(arguments.get(name) == 0 for name in ("p", "dropout_p", "dropout"))
    is_eval = any(arguments.get(name) is False for name in ("train", "training"))
    return not is_off and not is_eval


def _advise_on_draw(node: fx.Node, place: str) -> str:
    """Say how *node*, at *place*, draws no random numbers in eval mode."""
    # A layer of torch draws in train mode only.
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    if stack and "torch.nn.modules." in str(stack[-1][1]):
        return "this layer is in train mode, so do not call .train() in forward"

    name = operator_name(node)
    if "attention" in name:
        return "pass dropout_p=0.0 unless self.training"
    if "dropout" in name + place:
        return "for dropout, write training=self.training"
    return "draw them only if self.training"


def _get_constant(node: fx.Node) -> Tensor:
    """Return the constant tensor that *node* refers to; raises `CertificateError` for anything else."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise CertificateError(
            f"{node.name}: the graph depends on an object that is not a tensor"
        )
    return value


def _all_arguments(node: fx.Node) -> list[Any]:
    """List every argument of *node* in schema order, with defaults filled in.

    The momentum of a normalization that does not train has no effect; it is that of `nn.BatchNorm2d`.
    """
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return [*node.args, dict(node.kwargs)]
    arguments = arguments_by_name(target, node.args, node.kwargs)
    if "momentum" in arguments and not any(arguments.get(name) for name in _TRAINS):
        arguments["momentum"] = MOMENTUM
    return [*arguments.values()]


def arguments_by_name(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Map the arguments of the ATen *operator* by name, in the order of its schema, to those of a call."""
    schema = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    return defaults | dict(zip(defaults, args, strict=False)) | dict(kwargs)
