"""The site in Chromium, opened from its folder: a newcomer finds pages, on a desk and on a phone."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.reading import ROOT

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed"
    ),
]
# What a newcomer types, and the page that must come first
SEARCHES = {
    "api key": "operations.md",
    "batch size": "gpu.md",
    "class names": "photos.md",
    "confusion matrix": "evaluate.md",
    "docker": "deploy.md",
    "epochs": "train.md",
    "gpu memory": "gpu.md",
    "install": "index.md",
    "javascript": "http.md",
    "label": "keep.md",
    "learning rate": "train.md",
    "matrix square root": "second-order.md",
    "monitoring": "monitoring.md",
    "onnx": "bundle.md",
    "own model": "own-network.md",
    "roll back": "operations.md",
    "tables of the papers": "train.md",
    "tensorrt": "gpu.md",
    "write a plug-in": "train.md",
    "your own network": "own-network.md",
}
WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, which opens without a server."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True
    )
    return folder


@pytest.mark.parametrize("device", WIDTHS)
def test_the_search_finds_the_page_of_each_question_first(
    site: Path, open_page: Callable[..., Any], device: str
) -> None:
    viewport = {"width": WIDTHS[device], "height": 844}
    page = open_page(f"file://{site}", "/index.html", viewport=viewport)
    found = {}
    for text in SEARCHES:
        page.goto(f"file://{site}/index.html")
        if device == "phone":
            page.locator("label.md-header__button[for=__search]").click()
        page.locator("[data-md-component=search-query]").press_sequentially(text)
        first = page.locator(".md-search-result__item a").first
        first.wait_for()
        page.wait_for_function(
            "document.querySelector('.md-search-result__meta').textContent.includes('matching')"
        )
        page.wait_for_timeout(500)  # the results of the last letter replace the earlier ones
        file = first.evaluate("link => new URL(link.href).pathname")
        found[text] = file.rpartition(f"{site}/")[2].replace(".html", ".md")

    assert found == SEARCHES


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("name", ["index", "evaluate", "deploy", "cli"])
def test_nothing_is_cut_or_scrolls_sideways_and_no_option_is_broken(
    site: Path, open_page: Callable[..., Any], device: str, name: str
) -> None:
    page = open_page(
        f"file://{site}", f"/{name}.html", viewport={"width": WIDTHS[device], "height": 844}
    )
    page.locator("article h1").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= WIDTHS[device]

    broken = "all => all.filter((one) => one.getClientRects().length > 1).map((one) => one.textContent)"
    assert page.locator("article .name").evaluate_all(broken) == []

    if name != "cli":  # whose tables have four columns
        wide = "all => all.filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.textContent)"
        assert (
            page.locator("article .md-typeset__scrollwrap, article pre > code").evaluate_all(
                wide
            )
            == []
        )
    pictures = page.locator("article img").evaluate_all(
        "all => all.map((one) => one.naturalWidth > 0)"
    )
    assert all(pictures)
