"""The package: what it exports, what it loads, and the examples of its docstrings."""

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


def test_all_is_what_is_there():
    assert client.__all__ == sorted(client.__all__)
    assert all(hasattr(client, name) for name in client.__all__)


def test_a_client_loads_no_server_and_no_torch():
    code = (
        "import sys, sopdeploy.client; print([n for n in ('torch', 'onnx', 'onnxruntime', 'fastapi', "
        "'uvicorn', 'sopdeploy_service') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_clients_offer_the_same():
    offered = [{name for kind, name in METHODS if kind is wanted} for wanted in (Client, AsyncClient)]
    assert offered[0] == offered[1] == {"classify", "info", "metrics", "wait_ready"}
    for name in offered[0]:
        assert inspect.signature(getattr(Client, name)).parameters.keys() == (
            inspect.signature(getattr(AsyncClient, name)).parameters.keys()
        )


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_every_method_shows_an_example_that_parses(kind, name):
    lines = getattr(kind, name).__doc__.splitlines()
    example = [line for line in lines if line.startswith(" " * 12)]
    tree = ast.parse("async def _():\n" + "\n".join(example))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert name in {call.attr for call in calls if isinstance(call, ast.Attribute)}
