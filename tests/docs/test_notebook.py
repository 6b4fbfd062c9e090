"""Notebooks: imports and calls are valid; the slow test runs all cells."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sopdeploy
from tests.docs.notebook import code_cells
from tests.docs.reading import ROOT, name
from tests.docs.test_pages import module_at

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
GENERATE = module_at(ROOT / "docs" / "generate_notebook.py")


def imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield each imported name and its object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("IPython"):
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                yield alias.asname or alias.name, getattr(module, alias.name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_exist_and_calls_match_signatures(path: Path) -> None:
    cells = code_cells(path)
    tree = ast.parse("\n".join(cells))
    objects = dict(imported(tree))
    objects |= {f"sopdeploy.{function}": getattr(sopdeploy, function) for function in sopdeploy.__all__}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    checked = [node for node in calls if ast.unparse(node.func) in objects]
    for node in checked:
        keywords = {keyword.arg: None for keyword in node.keywords}
        function = objects[ast.unparse(node.func)]
        inspect.signature(function).bind(*node.args, **keywords)  # type: ignore[arg-type]
    assert len(checked) > 15
    assert sum("assert " in cell for cell in cells) > len(cells) / 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_have_no_outputs_and_their_pages_are_up_to_date(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert [cell["outputs"] for cell in book["cells"] if cell.get("outputs")] == []
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page == GENERATE.notebook_page(path), "run `make docs`"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_all_cells_run_in_order_without_warnings(path: Path, tmp_path: Path) -> None:
    packages = os.pathsep.join(str(ROOT / folder) for folder in (".", "export", "service"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.docs.notebook", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": packages, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "rejected: " in done.stdout
    assert list(tmp_path.glob("second-order-*/bundles/*/report.html"))
