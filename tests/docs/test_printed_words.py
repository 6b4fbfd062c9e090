"""What the program prints uses the words of the pages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_pages import AVOIDED

ROOT = Path(__file__).parents[2]
ROOMS = ("sopdeploy", "commands", "service", "export", "plugins")
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


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
def test_docstrings_and_keys_are_not_printed_texts(code: str, texts: list[str]) -> None:
    assert list(texts_of(code)) == texts


# "It is no image" is not English of today: "it is not an image". "There is no image" and "it is no
# longer an image" are.
IS_NO = re.compile(
    r"(?<!there)(?<![\s#])[\s#]+(?:is|are|was|were)[\s#]+no[\s#]+"
    r"(?!(?:longer|more|less|fewer|better|worse|others?)\b)[\w`-]+",
    re.IGNORECASE,
)
TEXTS = [
    file
    for room in (*ROOMS, "tests", "docs", "deploy", "benchmarks", "examples")
    for pattern in ("*.py", "*.md", "*.js", "*.html", "*.toml", "*.yaml")
    for file in sorted((ROOT / room).rglob(pattern))
    if file != Path(__file__)
]


def test_what_a_thing_is_not_is_said_in_natural_english() -> None:
    found = [
        (str(file.relative_to(ROOT)), match[0])
        for file in (*TEXTS, ROOT / "README.md", ROOT / "ARCHITECTURE.md")
        for match in IS_NO.finditer(file.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("it is no tar archive", True),
        ("files that\n    # are no images", True),
        ("There is no image", False),
        ("there\n    # are no images", False),
        ("it was no longer there", False),
    ],
)
def test_only_what_a_thing_is_not_is_found(text: str, is_found: bool) -> None:
    assert (IS_NO.search(text) is not None) == is_found
