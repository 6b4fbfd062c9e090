"""The pages that come from the code say what it says, and what pages name exists."""

import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.docs.reading import PAGES, ROOT, module_at, name

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
HOLDING = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)))
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
ERRORS = module_at(ROOT / "docs" / "generate_errors.py")


def test_the_page_of_the_errors_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == ERRORS.errors_page(), "run `make docs`"


def test_every_error_says_what_to_do_and_no_other() -> None:
    assert [kind.__name__ for kind in ERRORS.kinds()] == list(ERRORS.WHAT_TO_DO)
    assert len(ERRORS.tree()) == len(ERRORS.WHAT_TO_DO)


def test_every_code_of_the_table_says_what_to_do() -> None:
    http = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in ERRORS.code_rows(http)]
    assert len(rows) > 60
    assert [row[0] for row in rows if len(row) != 3 or not row[2].strip()] == []
    shown = re.findall(r"^\| \d.*$", http.partition("## Errors")[2], re.MULTILINE)
    assert len({row[1] for row in rows}) == len(shown)


@pytest.mark.parametrize(("file", "test"), HOLDING, ids="::".join)
def test_a_test_that_is_said_to_hold_a_line_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert test in {node.name for node in tree.body if isinstance(node, functions)}


def test_every_line_of_the_threat_model_names_a_test_that_holds_it() -> None:
    rows = [line for line in SECURITY.splitlines() if re.match(r"\| (?!an enemy|what goes|-)", line)]
    assert len(rows) > 25
    assert [row for row in rows if "::test_" not in row and not row.startswith("|---")] == []
    assert {file.split("/")[1] for file, _ in HOLDING} >= {"attacks", "service", "engines", "sopdeploy"}


@pytest.mark.parametrize("picture", PICTURES, ids=name)
def test_a_picture_is_drawn_without_anything_from_elsewhere_and_tells_itself(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    root = ET.fromstring(text)  # noqa: S314 - ours
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title")
    assert root.findtext(f"{space}desc")
    assert not re.search(r"<script|href=|url\((?!#)", text)
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"pictures/{picture.name})" in shown
