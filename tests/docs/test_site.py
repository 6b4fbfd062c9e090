"""The site in Chromium, opened from its folder: a stranger finds twelve pages, on a desk and on a phone."""

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
TASKS = {  # what a stranger looks for, and its page
    "your own network": "howto/your-network.md",
    "tables of the papers": "howto/reproduce.md",
    "monitoring": "howto/monitoring.md",
    "set an alarm": "howto/alerts.md",
    "write a plug-in": "howto/plug-in.md",
    "try the demo": "examples.md",
    "read a report": "howto/report.md",
    "keys": "keys.md",
    "roll back": "howto/roll-back.md",
    "gpu in docker": "howto/gpu.md",
    "batch size": "howto/batch-size.md",
    "javascript": "howto/javascript.md",
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
def test_each_task_is_one_click_from_the_front_page_and_first_in_the_search(
    site: Path,
    open_page: Callable[..., Any],
    device: str,
) -> None:
    assert len(TASKS) == 12
    page = open_page(
        f"file://{site}", "/index.html", viewport={"width": WIDTHS[device], "height": 844}
    )
    found = {}
    for task in TASKS:
        page.goto(f"file://{site}/index.html")
        link = page.locator("article a", has_text=task).first
        clicked = link.evaluate("link => link.href.split('#')[0]")
        if device == "phone":
            page.locator("label.md-header__button[for=__search]").click()
        page.locator("[data-md-component=search-query]").press_sequentially(task)
        first = page.locator(".md-search-result__item a").first
        first.wait_for()
        page.wait_for_function(
            "document.querySelector('.md-search-result__meta').textContent.includes('matching')"
        )
        searched = first.evaluate("link => new URL(link.href).pathname")
        found[task] = [one.rpartition(f"{site}/")[2] for one in (clicked, searched)]
    pages = {task: page.replace(".md", ".html") for task, page in TASKS.items()}
    assert found == {task: [page, page] for task, page in pages.items()}


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize(
    "name", ["index", "quickstart", "examples", "howto/alerts", "howto/report", "cli"]
)
def test_nothing_is_cut_or_scrolls_sideways_and_no_option_is_broken(
    site: Path,
    open_page: Callable[..., Any],
    device: str,
    name: str,
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
