"""The client package: exports, imports and docstring examples."""

import ast
import inspect
import subprocess
import sys

import pytest

from sopdeploy import client
from sopdeploy.client import AsyncClient, Client

METHODS = [
    (kind, name)
    for kind in (Client, AsyncClient)
    for name, _ in inspect.getmembers(kind, inspect.isfunction)
    if not name.startswith("_") and name not in {"close", "aclose"}
]


def test_all_lists_existing_names_in_order():
    assert client.__all__ == sorted(client.__all__)
    assert all(hasattr(client, name) for name in client.__all__)


def test_the_client_imports_neither_the_server_nor_torch():
    code = (
        "import sys, sopdeploy.client; print([n for n in ('torch', 'onnx', 'onnxruntime', 'fastapi', "
        "'uvicorn', 'sopdeploy_service') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_clients_have_the_same_methods_and_parameters():
    names = [{name for kind, name in METHODS if kind is wanted} for wanted in (Client, AsyncClient)]
    assert names[0] == names[1] == {"classify", "info", "metrics", "wait_ready"}
    for name in names[0]:
        blocking, awaited = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert blocking.parameters.keys() == awaited.parameters.keys()


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_every_method_has_an_example_that_parses(kind, name):
    lines = getattr(kind, name).__doc__.splitlines()
    example = [line for line in lines if line.startswith(" " * 12)]
    tree = ast.parse("async def _():\n" + "\n".join(example))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert name in {call.attr for call in calls if isinstance(call, ast.Attribute)}
