"""Operators whose ONNX forms were compared with the results of PyTorch, in a list that ships.

With the lowest, the locked and the newest versions of torch and ONNX Runtime, `tests/operators`
compares them on values that images hardly ever cause. `make goldens` writes `compared.txt`. A line
of it is a form: an operator, the kinds of its arguments, and what it becomes in ONNX. An export
warns of forms that are not in the list, and of indices of equal values, which PyTorch does not
define.
"""

import ast
import operator
import re
from collections import defaultdict
from pathlib import Path
from string import ascii_letters

import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram

from sopdeploy.errors import shorten
from sopdeploy_export.lower.constant_parts import find_constant_nodes
from sopdeploy_export.program_hashes import module_of

LIST = Path(__file__).with_name("compared.txt")
TRIVIAL = {"Constant", "Identity"}
# Their indices of equal values have no defined order, unlike those of `sort.stable`. The first two
# return the values before the indices.
UNORDERED = (
    torch.ops.aten.sort.default,
    torch.ops.aten.topk.default,
    torch.ops.aten.argsort.default,
)
_CALL = re.compile(
    r"target=torch\.ops\.(\w+\.\w+\.\w+)\]\(args = \((.*)\), kwargs = \{(.*)\}\)"
)
_EQUATION = re.compile(r"[\w ,.]+->[\w .]*(?=, \[)")
_NUMBER = re.compile(r"(?<![\w.%])-?(\d+(\.\d*)?(e[+-]?\d+)?|inf)(?![\w.])")


def warn_of_forms(model: ir.Model) -> list[str]:
    """Write a warning of the forms in *model*, as torch converts it, that no test compares."""
    forms = list_forms(model)
    compared = {*LIST.read_text(encoding="utf-8").splitlines()}
    places = {
        f"{form.partition('(')[0]} in {part}"
        for form, part in forms.items()
        if form not in compared
    }

    if not places:
        return []
    return [
        f"no test compares the ONNX forms of {shorten(sorted(places))} with PyTorch for infinities, NaN and "
        "other extreme values; the file was compared on images"
    ]


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


def warn_of_order(program: ExportedProgram) -> list[str]:
    """Write a warning of the operators in *program* that `find_order` lists."""
    places = find_order(program)
    if not places:
        return []
    return [
        f"{shorten(places)}: PyTorch does not define which of equal values comes first, so the file can give "
        "other indices; use torch.sort(stable=True)"
    ]


def list_forms(model: ir.Model) -> dict[str, str]:
    """List the forms in *model*, as torch converts it, each with the first part of the network that has it."""
    nodes_by_source = defaultdict(list)
    for node in model.graph:
        nodes_by_source[_source_of(node)].append(node)

    parts: dict[str, str] = {}
    for source, nodes in nodes_by_source.items():
        call = _CALL.search(source)
        if call is None:  # such as a position in a tuple
            continue
        target, *arguments = call.groups()
        kinds = ", ".join(filter(None, map(_describe_kinds, arguments)))
        becomes = sorted({node.op_type for node in nodes} - TRIVIAL)
        form = f"{target}({kinds}) = {' '.join(becomes)}".rstrip()
        parts.setdefault(form, part_of(nodes[0]))
    return parts


def _source_of(node: ir.Node) -> str:
    """Return the line of the captured graph that *node* is made of."""
    return node.metadata_props.get("pkg.torch.onnx.fx_node", "")


def part_of(node: ir.Node) -> str:
    """Name the innermost module of the network that *node* is in; "forward" is the whole network.

    Returns "" if torch has not written where *node* was captured.
    """
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if text is None:
        return ""

    # From the outermost module to the innermost, then the operation.
    *modules, _ = ast.literal_eval(text)
    name: str = modules[-1].removeprefix("network").removeprefix(".") if modules else ""
    return name or "forward"


def _describe_kinds(arguments: str) -> str:
    """Write `x` for each tensor or size in *arguments*, `n` for each number, and `[n]` for lists of them.

    The letters of an equation of einsum become a, b, ... in their order.
    """
    arguments = _EQUATION.sub(_rename_letters, arguments)
    kinds = re.sub(r"%\w+", "x", arguments.rstrip(","))
    kinds = _NUMBER.sub("n", kinds)
    return re.sub(r"\[[xn](, [xn])*\]", "[n]", kinds)


def _rename_letters(equation: re.Match[str]) -> str:
    """Return *equation* without blanks, its letters renamed in the order in which they first appear."""
    text = equation[0].replace(" ", "")
    letters = dict.fromkeys(filter(str.isalpha, text))
    names = dict(zip(letters, ascii_letters, strict=False))
    return "".join(names.get(character, character) for character in text)
