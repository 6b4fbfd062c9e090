"""The client package: exports, imports and docstring examples."""

import ast
import inspect
import subprocess
import sys

import pytest

from sopdeploy.client import AsyncClient, Client

NAMES = ["classify", "info", "metrics", "wait_ready"]


def test_the_client_imports_neither_the_server_nor_torch():
    heavy = ("torch", "onnx", "onnxruntime", "fastapi", "uvicorn", "sopdeploy_service")
    code = f"import sys, sopdeploy.client; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_both_clients_have_the_same_documented_methods(kind):
    functions = {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}
    assert sorted(functions - {"close", "aclose"}) == NAMES
    for name in NAMES:
        methods = [getattr(one, name) for one in (Client, kind)]
        assert len({tuple(inspect.signature(method).parameters) for method in methods}) == 1
        lines = [line for line in methods[1].__doc__.splitlines() if line.startswith(" " * 12)]
        tree = ast.parse("async def _():\n" + "\n".join(lines))  # the example
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert name in {call.attr for call in calls if isinstance(call, ast.Attribute)}
