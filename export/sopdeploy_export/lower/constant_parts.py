"""Evaluate the parts of a program that no image reaches, if their values decide the size of a result.

Examples are the positions of the upper triangle, `ones.triu().nonzero()`, and x[:, mask] with a
constant mask. ONNX has no fixed size for such results. Only the program that is converted
changes, not the one that the certificate is about.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils._pytree import tree_map_only

INDEX = torch.ops.aten.index.Tensor
PREFIX = "constant"  # of the names of evaluated tensors


def fold_constant_parts(program: ExportedProgram) -> ExportedProgram:
    """Copy *program* with constants in place of nodes that no image reaches and whose values decide sizes.

    The nodes that no image reaches and that follow these are replaced, too. A constant mask becomes
    the positions that it chooses. Returns *program* itself if it has neither such nodes nor constant
    masks.
    """
    constant_nodes = find_constant_nodes(program)
    have_sizes_from_values = any(map(_has_size_from_values, constant_nodes))
    if not have_sizes_from_values and not _constant_masks(program, constant_nodes):
        return program

    # A copy of the program, its constant nodes, and the tensors that it stores.
    program = program.run_decompositions({})
    constant_nodes = find_constant_nodes(program)
    stored = {**program.state_dict, **program.constants}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    @cache
    def evaluate(node: fx.Node) -> Any:
        """Compute the value of a constant node from those of its operands."""
        if node.op == "placeholder":
            return stored[str(specs[node.name].target)]
        args, kwargs = tree_map_only(fx.Node, evaluate, (node.args, node.kwargs))
        function: Any = node.target
        return function(*args, **kwargs)

    # The constant nodes whose values decide sizes, and the constant nodes behind them.
    evaluated: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_behind = not evaluated.isdisjoint(node.all_input_nodes)
        if node in constant_nodes and (is_behind or _has_size_from_values(node)):
            evaluated.add(node)

    # Replace these nodes and the constant masks. The masks are listed first, because replacements
    # change what a node reads.
    masks = _constant_masks(program, constant_nodes)
    with torch.no_grad():
        for node in list(program.graph.nodes):
            if node in evaluated and node.op == "call_function":
                _replace_by_value(program, node, evaluate(node), constant_nodes)
            elif node in masks:
                values = [None if mask is None else evaluate(mask) for mask in masks[node]]
                _replace_masks(program, node, values)

    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program.run_decompositions({})  # computes all sizes again


def find_constant_nodes(program: ExportedProgram) -> set[fx.Node]:
    """Find the nodes of *program* that depend on no image and on no random number."""
    images = set(program.graph_signature.user_inputs)
    constant_nodes = set[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            is_constant = node.name not in images
        else:
            is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            is_call = node.op == "call_function" and not is_random
            is_constant = is_call and constant_nodes.issuperset(node.all_input_nodes)
        if is_constant:
            constant_nodes.add(node)
    return constant_nodes


def _has_size_from_values(node: fx.Node) -> bool:
    """Return whether values decide the size of the result of *node*, as those of `nonzero` or of a mask."""
    if node.target == INDEX:
        indices: Any = node.args[1]
        return any(map(_is_mask, indices))
    lacks_tag = node.target == torch.ops.aten.nonzero_numpy.default
    return lacks_tag or torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _is_mask(index: fx.Node | None) -> bool:
    """Return whether *index*, an index of a tensor, holds truth values; None is a full slice."""
    return index is not None and index.meta["val"].dtype == torch.bool


def _constant_masks(
    program: ExportedProgram, constant_nodes: set[fx.Node]
) -> dict[fx.Node, list[fx.Node | None]]:
    """Map each node that indexes a tensor by masks in *constant_nodes* to these masks; None is another index."""
    masks = {}
    for node in program.graph.find_nodes(op="call_function", target=INDEX):
        masks_of_node = [
            index if _is_mask(index) and index in constant_nodes else None
            for index in node.args[1]
        ]
        if node not in constant_nodes and any(masks_of_node):
            masks[node] = masks_of_node
    return masks


def _replace_by_value(
    program: ExportedProgram, node: fx.Node, value: Any, constant_nodes: set[fx.Node]
) -> None:
    """Give the users of *node* that are not in *constant_nodes* its *value*.

    The others are evaluated themselves. If there are only others and *node* is a check, it is
    erased; other nodes that nothing needs are removed later.
    """
    users = [user for user in node.users if user not in constant_nodes]
    if not users:
        if node.is_impure():
            program.graph.erase_node(node)
        return

    # A tensor becomes an input of the program.
    if isinstance(value, Tensor):
        added = _add_constant(program, value)
        for user in users:
            user.replace_input_with(node, added)
        return

    # A number, such as a size, becomes an argument.
    for user in users:
        user.args, user.kwargs = tree_map_only(
            fx.Node,
            lambda operand: value if operand is node else operand,
            (user.args, user.kwargs),
        )


def _replace_masks(
    program: ExportedProgram, node: fx.Node, masks: Sequence[Tensor | None]
) -> None:
    """Replace each index of *node* that has a mask in *masks* by the positions that this mask chooses."""
    x, indices = cast(tuple[Any, Any], node.args)

    new_indices: list[Any] = []
    for index, mask in zip(indices, masks, strict=True):
        if mask is None:
            new_indices.append(index)
        else:  # one index per axis of the mask
            positions_by_axis = mask.nonzero(as_tuple=True)
            new_indices += [_add_constant(program, each) for each in positions_by_axis]
    node.args = (x, new_indices)


def _add_constant(program: ExportedProgram, value: Tensor) -> fx.Node:
    """Add the constant *value* to the inputs of *program*; return its node."""
    value = value.detach().clone()
    target = f"{PREFIX}_{len(program.constants)}"

    # The node is the first input. Its `val` is a tensor that has the shape and type of *value* only.
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node = program.graph.placeholder(target)
    fake_mode = first.meta["val"].fake_mode
    node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)

    # The signature must have the inputs in the order of their nodes.
    spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), target)
    program.graph_signature.input_specs.insert(0, spec)
    program.constants[target] = value
    return node
