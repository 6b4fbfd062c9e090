"""The generated pages of errors are up to date, and the site is complete."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.reading import PAGES, ROOT, module_at, name

ERRORS = module_at(ROOT / "docs" / "generate_errors.py")


def test_the_errors_pages_of_the_documentation_and_the_server_are_up_to_date() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == ERRORS.errors_page(), "run `make docs`"
    assert ERRORS.SERVED.read_text(encoding="utf-8") == ERRORS.served_page(), "run `make docs`"


def test_the_page_of_other_photographs_has_the_measured_values() -> None:
    photos = module_at(ROOT / "docs" / "generate_other_photos.py")
    assert photos.PAGE.read_text(encoding="utf-8") == photos.other_photos_page(), "run `make docs`"


BLOCK_OR_LINK = re.compile(r"^( *)```.*?^\1```|\[[^\]]*\]\([^)]*\)", re.DOTALL | re.MULTILINE)
CODE_OR_WORD = re.compile(r"`[^`]*`|[^\s`]+")
NAME = re.compile(r"`?([\w./-]+\.md)`?[.,;:)]*")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_that_names_another_one_links_to_it(page: Path) -> None:
    words = CODE_OR_WORD.findall(BLOCK_OR_LINK.sub("", page.read_text(encoding="utf-8")))
    named = [found[1] for word in words if (found := NAME.fullmatch(word))]
    places = {(folder / path).resolve() for path in named for folder in (ROOT, page.parent)}
    of_the_site = {one for one in PAGES if one.parent != ROOT}  # its pages cannot link to others
    linked = of_the_site if page in of_the_site else {*PAGES}
    assert [name(one) for one in places & linked if one != page] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_in_a_sentence_is_on_one_line(page: Path) -> None:
    """A reader of the Markdown file can copy it in one piece."""
    code = re.findall(r"`[^`]*`", BLOCK_OR_LINK.sub("", page.read_text(encoding="utf-8")))
    assert [one for one in code if "\n" in one] == []


CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_warnings_and_is_self_contained(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    assert [url for page in pages for url in LOADED.findall(page.read_text(encoding="utf-8"))] == []
