"""The docstrings of public names have the sections that readers expect, and their examples work."""

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

import sopdeploy
from tests.docs.page_commands import Workspace

# In this order: later ones read what `train` and `export` have written.
FIRST = ("train", "evaluate", "export")
TOP = [*FIRST, *(name for name in sopdeploy.__all__ if name not in {*FIRST, "__version__"})]
LAYERS = [name for name, value in vars(sopdeploy.layers).items() if callable(value)]
PUBLIC = {
    **{f"sopdeploy.{name}": getattr(sopdeploy, name) for name in TOP},
    **{f"sopdeploy.layers.{name}": getattr(sopdeploy.layers, name) for name in LAYERS},
}
RUN = """
import doctest, io, json, os, signal, socket, sys, threading, time, warnings
import torch
import sopdeploy

warnings.simplefilter("error")
port = int(os.environ["SOPDEPLOY_PORT"])

def stop_server():  # Ctrl-C, when the server listens
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

problems = {}
for name, text in json.load(sys.stdin).items():
    if name == "sopdeploy.serve":
        threading.Thread(target=stop_server, daemon=True).start()
    names = {"sopdeploy": sopdeploy, "torch": torch}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    report = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write)
    problems[name] = report.getvalue() if results.attempted else "no example"
print("\\n" + json.dumps(problems))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What went wrong in the examples of each name, run in one folder in the order of `PUBLIC`."""
    workspace = Workspace(tmp_path_factory.mktemp("examples"))
    first = [f"sopdeploy.{name}" for name in FIRST]
    problems: dict[str, str] = {}

    # The others name the bundle that the first ones export.
    for names in (first, [name for name in PUBLIC if name not in first]):
        texts = {name: workspace.resolve(inspect.getdoc(PUBLIC[name]) or "") for name in names}
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(texts),
            cwd=workspace.folder,
            env=workspace.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        problems |= json.loads(done.stdout.splitlines()[-1])
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_public_name_work(name: str, results: Mapping[str, str]) -> None:
    assert not results[name], results[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_has_the_sections_of_its_signature(name: str) -> None:
    value: Any = PUBLIC[name]
    text = inspect.getdoc(value) or ""
    needed = {"Examples:"}
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        needed |= {"Args:"} if signature.parameters else set()
        needed |= set() if signature.return_annotation in {None, "None"} else {"Returns:"}

    assert {section for section in needed if f"\n{section}\n" not in text} == set()
