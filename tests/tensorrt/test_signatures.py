"""Every call of TensorRT and CUDA in our code fits the signature in the real bindings.

Calls are found in the source. The bindings of CUDA come with torch; those of TensorRT are installed by `make
cuda-stand-in` and read in a process of their own. Both are imported without a GPU.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.stand_in import ABSENT, FOLDER, installed

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "sopdeploy" / "tensorrt").glob("*.py"),
    *(ROOT / "export" / "sopdeploy_export" / "engine_builder").glob("*.py"),
    ROOT / "service" / "sopdeploy_service" / "runtime" / "tensorrt.py",
]
# Methods of lists and of our own classes with the names of methods of TensorRT
OURS = {"__init__", "append", "clear", "constant", "infer_shapes", "insert", "pop", "remove", "update"}
READ_BINDINGS = """
import inspect, json, tensorrt
methods = {}
for kind, members in inspect.getmembers(tensorrt, inspect.isclass):
    for name, method in inspect.getmembers(members, callable):
        if name == "__init__" or not name.startswith("_"):
            methods[f"{kind}.{name}"] = method.__doc__ or ""
print(json.dumps(methods))
"""


class Used(NamedTuple):
    """A call in the source: name, positional arguments, whether more are unpacked, and keywords."""

    name: str
    positional: int
    unpacked: bool
    keywords: frozenset[str]
    place: str


def used(node: ast.Call, name: str, path: Path, *, skip: int = 0) -> Used:
    """Describe the call *node* without its first *skip* arguments."""
    plain = [argument for argument in node.args[skip:] if not isinstance(argument, ast.Starred)]
    unpacked = len(plain) < len(node.args) - skip
    keywords = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
    return Used(name, len(plain), unpacked, keywords, f"{path.name}:{node.lineno}")


def calls() -> Iterator[tuple[ast.Call, Path]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield node, path


@cache
def tensorrt_methods() -> dict[str, str]:
    """Return the docstrings of the methods of the real TensorRT bindings, by `Class.method`."""
    bindings = str(FOLDER / "bindings")
    environment = {**os.environ, "PYTHONPATH": bindings, "LD_LIBRARY_PATH": bindings}
    found = subprocess.run(
        [sys.executable, "-c", READ_BINDINGS], env=environment, capture_output=True, text=True, check=True
    )
    methods: dict[str, str] = json.loads(found.stdout)
    return methods


def signatures(docstring: str, name: str) -> list[list[str]]:
    """Return the parameters of each overload without `self`; those with a default end in `=`."""
    found = []
    for parameters in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", docstring, re.MULTILINE):
        parts = re.findall(r"(\w+): [^,]*?( = [^,]+)?(?:, |$)", parameters)
        found.append([part + "=" * bool(default) for part, default in parts if part != "self"])
    return found


def fits(call: Used, parameters: list[str]) -> bool:
    names = [parameter.removesuffix("=") for parameter in parameters]
    required = {parameter for parameter in parameters if not parameter.endswith("=")}
    given = {*names[: call.positional], *call.keywords}
    return (
        call.positional <= len(names) and call.keywords <= set(names) and (call.unpacked or required <= given)
    )


def tensorrt_calls() -> list[Used]:
    """Find the calls of methods that a TensorRT class has, and of constructors."""
    kinds = {name.partition(".")[0] for name in tensorrt_methods()}
    methods = {name.partition(".")[2] for name in tensorrt_methods()} - OURS
    found = []
    for node, path in calls():
        function = node.func
        if isinstance(function, ast.Name) and function.id == "create":  # create(trt, "Builder", logger)
            kind = node.args[1]
            assert isinstance(kind, ast.Constant)
            found.append(used(node, f"{kind.value}.__init__", path, skip=2))
        elif isinstance(function, ast.Attribute):
            constructs = isinstance(function.value, ast.Name) and function.value.id == "trt"
            if constructs and function.attr in kinds:
                found.append(used(node, f"{function.attr}.__init__", path))
            elif function.attr in methods:
                found.append(used(node, function.attr, path))
    return found


@pytest.mark.skipif(not installed(), reason=ABSENT)
def test_every_call_of_tensorrt_fits_a_signature() -> None:
    found = tensorrt_calls()
    assert len(found) > 20
    for call in found:
        name = call.name.rpartition(".")[2]
        end = call.name if "." in call.name else f".{call.name}"
        known = [
            parameters
            for full, docstring in tensorrt_methods().items()
            if full.endswith(end)
            for parameters in signatures(docstring, name)
        ]
        assert any(fits(call, parameters) for parameters in known), f"{call.place}: {name} takes {known}"


def test_every_call_of_cuda_fits_its_signature() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    found, names = [], set()
    for node, path in calls():
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        names |= {text for text in texts if text.startswith("cuda") and text[4:5].isupper()}
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function == "call" and texts and texts[0] in names:
            found.append(used(node, texts[0], path, skip=1))
    assert len(found) > 10
    assert [name for name in names if not hasattr(runtime, name)] == []
    for call in found:
        parameters = inspect.signature(getattr(runtime, call.name)).parameters
        assert fits(call, list(parameters)), f"{call.place}: {call.name} takes {list(parameters)}"
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(dir(runtime.cudaDeviceProp))
