"""Names that belong together, read from the code: what is defined is used, and arguments arrive."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.rooms import PACKAGES, ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for folder in PACKAGES.values()
    for path in sorted(folder.rglob("*.py"))
}

# What a library calls or reads by its name
FOR_LIBRARIES = {
    "_repr_html_",
    # FastAPI
    "get_route_handler",
    # docs/generate_operations.py
    "STATEMENT",
    # onnxruntime
    "get_next",
    # timm
    "group_matcher",
    "no_weight_decay",
    "set_grad_checkpointing",
    # TensorRT
    "phase_finish",
    "phase_start",
    "step_complete",
    # asyncio, uvicorn, httpx
    "buffer_updated",
    "data_received",
    "expect_100_continue",
    "should_exit",
    # click, logging, reprlib, model-signing
    "add_ignored_paths",
    "emit",
    "format_help",
    "format_options",
    "maxlevel",
    "maxother",
    "maxstring",
    "repr_int",
    # Of asyncio's tasks, one without a reference may be collected while it runs.
    "_replacing",
    # The registry of metrics has it.
    "dropped_log_lines",
    # The program that wrote the file of other things used it (its docstring).
    "store_vectors",
}


def names_read(tree: ast.AST) -> Iterator[str]:
    """Yield each name, attribute and word of a short text that *tree* reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_short = len(node.value) < 80  # such as "module:function", and no docstring
            yield from re.findall(r"\w+", node.value) if is_short else ()


def names_made(tree: ast.Module) -> Iterator[str]:
    """Yield what *tree* defines for others: functions, methods, classes, constants and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":  # other objects may be of a library
                yield node.attr
        elif isinstance(node, Function | ast.ClassDef) and not node.decorator_list:
            yield node.name
        elif (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper()
        ):
            yield node.id


def test_something_uses_whatever_the_packages_define() -> None:
    """The use by a test is not enough: what only tests call can go with them."""
    read = Counter(name for tree in TREES.values() for name in names_read(tree))
    made = {name for tree in TREES.values() for name in names_made(tree)}
    unused = {name for name in made if not read[name] and not name.startswith("__")}

    assert len(made) > 4000
    assert unused == FOR_LIBRARIES


class Signature(NamedTuple):
    """The names of parameters: the `positional` ones in order, and those with a default."""

    positional: tuple[str, ...]
    optional: frozenset[str]

    @classmethod
    def of(cls, function: Function, owner: ast.ClassDef | None) -> "Signature":
        given = function.args
        names = [one.arg for one in (*given.posonlyargs, *given.args)]
        optional = names[len(names) - len(given.defaults) :]
        optional += [
            one.arg
            for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
            if default is not None
        ]
        is_static = any("static" in ast.unparse(one) for one in function.decorator_list)
        is_bound = owner is not None and not is_static
        return cls(tuple(names[is_bound:]), frozenset(optional))


def bases_of(node: ast.ClassDef) -> set[str]:
    """Return the bases of *node* that may have fields of their own."""
    return {ast.unparse(base) for base in node.bases} - {"NamedTuple", "StrictModel"}


def signatures() -> dict[str, Signature]:
    """Return the signature of each name that all functions and constructors of this name share."""
    found = defaultdict[str, set[Signature]](set)
    for tree in TREES.values():
        owners = {
            id(one): node
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for one in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, Function):
                owner = owners.get(id(node))
                name = owner.name if owner and node.name == "__init__" else node.name
                found[name].add(Signature.of(node, owner))
            elif isinstance(node, ast.ClassDef) and not bases_of(node):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                names = tuple(ast.unparse(one.target) for one in fields)
                optional = frozenset(ast.unparse(one.target) for one in fields if one.value)
                found[node.name] |= {Signature(names, optional)} if names else set()
    return {name: next(iter(each)) for name, each in found.items() if len(each) == 1}


def name_of(node: ast.expr) -> str:
    """Return the last name of a variable or attribute, or ""."""
    return getattr(node, "attr", getattr(node, "id", ""))


def calls(function: Function) -> Iterator[tuple[str, list[ast.expr], list[ast.keyword]]]:
    """Yield the name and the arguments of each call in *function*, also of one in another thread."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        arguments = node.args
        if name_of(called) in ("partial", "to_thread") and arguments:
            called, *arguments = arguments
        is_spread = any(isinstance(one, ast.Starred) for one in arguments)
        if not is_spread and all(keyword.arg for keyword in node.keywords):
            yield name_of(called), arguments, node.keywords


# Parameters that get an argument with the name of another one: `place = former`
OTHERWISE_NAMED = {
    "group_by_features.outputs = images",
    "Cost.encoded = pixels",
    "FeatureBatch.file_hashes = hashes",
    "_share.images = count",
    "_find_class_names.weights = file",
    "_waves.columns = size",
    "_waves.rows = size",
    "can_leave_out.total = count",
    "compare_outputs.probes = batch",
    "conv3x3.in_channels = out_channels",
    "count_bundle.runtime = name",
    "describe_difference.expected = root",
    "describe_options.given = config",
    "dimension_reduction.width = channels",
    "open_division.source = last",
    "read_few_shot_fit.source = last",
    "read_frozen.source = last",
    "read_left_out.source = last",
    "read_recorded_recipe.source = last",
    "read_resumed.source = last",
    "receive.deadline = end",
    "restore_loop.source = last",
    "scaled_resize.crop_before = crop",
    "set_owner.like = path",
}
# Options that a function with a parameter of this name leaves as they are
NOT_PASSED_ON = {
    "command: one_line_errors.keys",
    "__init__: conv1x1.stride",
    "__init__: conv3x3.stride",
    "__init__: convolution.kernel",
    "__init__: convolution.stride",
    "_mean_outputs: open_session.weights",
    "close: _end_child.reason",
    "export_network: check_constants.rebuild",
    "open_graph: _count_operators.provider",
    "plot: plot.logarithmic",
    "register_model: Entry.name",
    "timm_entry: Entry.name",
}


def test_an_argument_with_the_name_of_a_parameter_goes_there() -> None:
    known = signatures()
    otherwise = set()
    not_passed_on = set()
    num_calls = 0
    functions = [
        node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    for function in functions:
        given = function.args
        own = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        for called, arguments, keywords in calls(function):
            if called not in known or called in dir(str):
                continue
            num_calls += 1
            positional, optional = known[called]
            for parameter, argument in zip(positional, arguments, strict=False):
                name = name_of(argument)
                if name != parameter and name in positional:
                    otherwise.add(f"{called}.{parameter} = {name}")

            passed = {*positional[: len(arguments)], *(keyword.arg for keyword in keywords)}
            not_passed_on |= {
                f"{function.name}: {called}.{name}" for name in (optional & own) - passed
            }

    assert num_calls > 5000
    assert (otherwise, not_passed_on) == (OTHERWISE_NAMED, NOT_PASSED_ON)
