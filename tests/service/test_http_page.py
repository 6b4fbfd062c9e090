"""`docs/http.md` is true: its examples run, and its codes are the service's."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
SERVICE = ROOT / "service" / "sopdeploy_service"
MAKERS = {"Refusal", "bad_request", "ImageError", "cls"}
FRAMEWORK = {"not_found", "method_not_allowed"}  # made of the status by `problems`
NAMED_BY_FIELD = {f"{what}_{side}" for what in ("unknown", "duplicate") for side in ("input", "output")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(client, jpeg, tmp_path) -> str:
    """Where the examples find their pictures; the address of the server instead of that on the page."""
    for name in ("photo.jpg", "other.png"):
        (tmp_path / name).write_bytes(jpeg)
    return client.base_url.netloc.decode()


@pytest.mark.parametrize("example", blocks("python"))
def test_every_python_example_runs(example, place, tmp_path):
    if "tritonclient" in example:
        pytest.importorskip("tritonclient")
    code = example.replace("127.0.0.1:8000", place)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert re.search(r"ant|bee|cat|dog|eel|fox|gnu", found.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("example", blocks("bash"))
def test_every_curl_example_is_answered(example, place, tmp_path):
    command = example.replace("127.0.0.1:8000", place).replace("curl ", "curl -sS --fail ", 1)
    found = subprocess.run(
        ["bash", "-c", command],  # noqa: S607
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )
    assert found.returncode == 0, found.stderr
    assert re.search(r"probability|logits", found.stdout)


def codes_of(module: Path) -> set[str]:
    """Return the codes that *module* writes into refusals."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        first = [*node.args[:1]] if isinstance(node.func, ast.Name) and node.func.id in MAKERS else []
        given = first + [keyword.value for keyword in node.keywords if keyword.arg == "code"]
        for value in given:
            found |= {
                n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
    return {
        code
        for code in found
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|deadline|draining|forbidden|unauthenticated", code)
    }


def test_every_code_of_the_service_is_on_the_page_and_no_other():
    table = PAGE.partition("## Errors")[2]
    named = {
        code for row in re.findall(r"^\| \d+.*$", table, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)
    }
    written = set().union(*(codes_of(module) for module in SERVICE.rglob("*.py")))
    assert named - FRAMEWORK - NAMED_BY_FIELD == written
