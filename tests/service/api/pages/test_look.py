"""Page layout on desktop and phone, light and dark; `/docs` shows the whole API.

`SOPDEPLOY_SCREENSHOTS=folder` takes screenshots.
"""

import os
import re
from pathlib import Path

import pytest

from tests.service.api.pages.conftest import give

pytestmark = pytest.mark.browser

PHONE = {"width": 380, "height": 800}


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("light", {}),
        ("phone-dark", {"viewport": PHONE, "color_scheme": "dark"}),
    ],
)
def test_the_pages_fit_desktop_and_phone_in_light_and_dark(open_page, client, jpeg, path, name, traits):
    page = open_page(client.base_url, path, **traits)
    if path == "/":
        give(page, jpeg, name="a-file-with-a-long-name-and-nowhere-to-break-it-" * 3 + ".jpg")
    else:
        page.wait_for_selector("#schemas section")
    if folder := os.environ.get("SOPDEPLOY_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{path.strip('/') or 'page'}-{name}.png", full_page=True)
    wide, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= there
    ground = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (brightness < 60) == (traits.get("color_scheme") == "dark")


def test_the_docs_show_every_operation_and_body(open_page, client):
    page = open_page(client.base_url, "/docs")
    page.wait_for_selector("#schemas section")
    openapi = client.get("/openapi.json").json()
    operations = [f"{verb.upper()}{path}" for path, verbs in openapi["paths"].items() for verb in verbs]
    assert page.locator(".operation h2").all_text_contents() == operations
    assert page.locator("#contents a").all_text_contents() == operations
    assert page.locator("#schemas h3").all_text_contents() == list(openapi["components"]["schemas"])
    dead = page.locator("a[href^='#']").evaluate_all(
        "all => all.filter(e => !document.querySelector(e.getAttribute('href'))).map(e => e.href)"
    )
    assert dead == []
