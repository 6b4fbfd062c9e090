"""What the program prints uses the words of the pages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_pages import AVOIDED

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for room in ("sopdeploy", "commands", "service", "export", "plugins")
    for file in sorted((ROOT / room).rglob("*.py"))
]


def texts_of(code: str) -> Iterator[str]:
    """Yield the texts in *code* of more than a word, without docstrings."""
    nodes = list(ast.walk(ast.parse(code)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str) and " " in node.value:
            yield node.value


def test_printed_texts_avoid_the_phrases_that_pages_avoid() -> None:
    avoided = rf"{AVOIDED}|\b(?:that of|those of)\b"
    found = [
        (str(file.relative_to(ROOT)), text)
        for file in FILES
        for text in texts_of(file.read_text(encoding="utf-8"))
        if re.search(avoided, text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ('"""One of yours."""\nx = "an own one"', ["an own one"]),
        (
            'def f():\n    """Do it anew."""\n    raise E(f"{x} anew, " "again")',
            [" anew, again"],
        ),
        ('{"photograph": 1}', []),
    ],
)
def test_docstrings_and_keys_are_no_printed_texts(code: str, texts: list[str]) -> None:
    assert list(texts_of(code)) == texts
