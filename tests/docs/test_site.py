"""The documentation site: navigation is complete, it builds without warnings and is self-contained."""

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.reading import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)


def test_the_navigation_lists_every_page() -> None:
    named = re.findall(r"^ +- (?:.*: )?([\w/-]+\.md)$", CONFIG.partition("\nnav:")[2], re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    measured = {page for page in pages if page.startswith("benchmarks/")} - {"benchmarks/index.md"}
    assert sorted(named) == sorted(set(pages) - measured)
    index = (ROOT / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    assert {f"benchmarks/{page}" for page in re.findall(r"\]\(([\w-]+\.md)\)", index)} == measured


def test_every_claim_of_the_measurements_page_is_a_quotation_of_the_readme() -> None:
    index = (ROOT / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    claims = re.findall(r"^\| (\".*?\") \| ", index, re.MULTILINE)
    quotations = [quoted for claim in claims for quoted in re.findall(r'"(.+?)"', claim)]
    assert len(quotations) > 5
    assert [quoted for quoted in quotations if quoted.replace("\\|", "|") not in readme] == []


UNITS = r"(?:%|GB|MB|images/s|minutes|ms|points|seconds|times)"


def test_every_measured_number_of_the_readme_is_on_the_page_of_measurements() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    numbers = set(re.findall(rf"\d[\d.,]*(?: to \d+)? {UNITS}(?!\w)", re.sub(r"`[^`]*`", "", text)))
    definitions = {"16 times", "4 times"}  # of tolerances
    stated = (ROOT / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    assert [number for number in sorted(numbers - definitions) if number not in stated] == []


def test_the_site_uses_no_external_fonts_or_scripts() -> None:
    assert re.search(r"^  font: false$", CONFIG, re.MULTILINE)
    assert "://" not in CONFIG


def test_every_object_of_the_api_page_exists_and_has_a_docstring() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 15
    undocumented = [path for path in named if not pkgutil.resolve_name(path).__doc__]
    assert undocumented == []


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
