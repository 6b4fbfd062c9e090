"""Page layout on desktop and phone, light and dark; `/docs` shows the whole API and sends requests.

`SOPDEPLOY_SCREENSHOTS=folder` takes screenshots.
"""

import os
import re
from pathlib import Path

import pytest

from tests.service.api.pages.conftest import give, operate

pytestmark = pytest.mark.browser

PHONE = {"width": 380, "height": 800}


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("light", {}),
        ("phone-dark", {"viewport": PHONE, "color_scheme": "dark"}),
    ],
)
def test_the_pages_fit_desktop_and_phone_in_light_and_dark(open_page, client, jpeg, name, traits):
    page = open_page(client.base_url, "/", **traits)
    give(page, jpeg, name="a-file-with-a-long-name-and-nowhere-to-break-it-" * 3 + ".jpg")
    if folder := os.environ.get("SOPDEPLOY_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"page-{name}.png", full_page=True)
    wide, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= there
    ground = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (brightness < 60) == (traits.get("color_scheme") == "dark")


def test_the_docs_show_every_operation_and_send_requests(open_page, client):
    page = open_page(client.base_url, "/docs")
    page.locator(".opblock").first.wait_for()
    openapi = client.get("/openapi.json").json()
    operations = {f"{verb.upper()} {path}" for path, verbs in openapi["paths"].items() for verb in verbs}
    shown = page.locator(".opblock").evaluate_all(
        "all => all.map(e => `${e.querySelector('.opblock-summary-method').textContent} "
        "${e.querySelector('.opblock-summary-path').dataset.path}`)"
    )
    assert set(shown) == operations
    with page.expect_response("**/info") as response:
        operate(page, "/info")
    assert response.value.json() == client.get("/info").json()
