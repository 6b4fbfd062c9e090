"""Operators that put values in an order, whose indices PyTorch does not define for equal values."""

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from sopdeploy.errors import shorten
from sopdeploy_export.lower.constant_parts import find_constant_nodes
from sopdeploy_export.program_hashes import module_of

# Unlike `sort.stable`. The first two return the values before the indices.
UNORDERED = (
    torch.ops.aten.sort.default,
    torch.ops.aten.topk.default,
    torch.ops.aten.argsort.default,
)


def find_order(program: ExportedProgram) -> list[str]:
    """List the operators in *program* whose indices are used, and can differ for equal values, with their parts.

    Those that no image reaches are left out: their values are the same in every run.
    """
    constant_nodes = find_constant_nodes(program)
    return [
        f"{node.target} in {module_of(node)}"
        for node in program.graph.nodes
        if node.target in UNORDERED
        and node not in constant_nodes
        and any(map(_may_read_indices, node.users))
    ]


def _may_read_indices(user: fx.Node) -> bool:
    """Check whether *user*, of an operator in `UNORDERED`, does not only take the values, its first output."""
    takes_one_output = user.target is operator.getitem
    return not takes_one_output or bool(user.args[1] == 1)


def warn_of_order(places: Sequence[str]) -> list[str]:
    """Write a warning of the operators that `find_order` lists, *places*."""
    if not places:
        return []
    return [
        f"{shorten(places)}: PyTorch does not define which of equal values comes first, so the file can give "
        "other indices; use torch.sort(stable=True)"
    ]
