"""Chromium, and the actions of a user; pages must not contact other hosts or violate their policy."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

DESK = {"width": 1200, "height": 900}
# With a camera that shows a moving picture, which every page may use.
ARGUMENTS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


@pytest.fixture(scope="module")
def chromium(program: Callable[[str], str]) -> Iterator[Any]:
    """One browser per file: while it runs, Playwright's event loop prevents `asyncio.run` in this process."""
    playwright_api = pytest.importorskip("playwright.sync_api")

    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium"), args=ARGUMENTS
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, **traits)`; fails at the end on requests to other hosts and on console errors."""
    contexts: list[Any] = []
    errors: list[str] = []

    def open_one(url: httpx.URL, path: str = "/", **traits: Any) -> Any:
        host = str(url).rstrip("/")
        context = chromium.new_context(**{"viewport": DESK, **traits})
        contexts.append(context)
        context.set_default_timeout(60_000)
        context.route(
            lambda target: not target.startswith((host, "blob:", "data:")),
            lambda route: (errors.append(f"target {route.request.url}"), route.abort()),
        )
        page = context.new_page()
        page.on("pageerror", lambda problem: errors.append(f"raised {problem}"))
        page.on("console", lambda message: errors.extend(complaints(message)))
        page.goto(host + path)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


def complaints(message: Any) -> list[str]:
    """Errors and warnings, except the expected 4xx responses."""
    expected = message.text.startswith(
        "Failed to load resource: the server responded with a status of 4"
    )
    return [message.text] if message.type in {"error", "warning"} and not expected else []


@pytest.fixture
def page(open_page: Callable[..., Any], client: httpx.Client) -> Any:
    return open_page(client.base_url)


# Dispatches a drop or paste event with a file.
SEND_FILE = """([kind, bytes, name, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const traits = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { ...traits, clipboardData: files })
    : new DragEvent("drop", { ...traits, dataTransfer: files });
  document.getElementById("drop").dispatchEvent(event);
}"""


def give(
    page: Any, body: bytes, *, kind: str = "drop", name: str = "a.jpg", type: str = "image/jpeg"
) -> None:
    page.evaluate(SEND_FILE, [kind, list(body), name, type])
    done(page)


def operate(page: Any, path: str) -> None:
    """Send the request of the operation at *path* in Swagger UI."""
    block = page.locator(".opblock", has=page.locator(f"[data-path='{path}']")).first
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()


def done(page: Any) -> None:
    page.wait_for_selector("#answer[aria-busy=false] :is(#classes li, #error:not([hidden]))")


def shown(page: Any) -> list[tuple[str, str]]:
    labels, percents = (
        page.locator(f"#classes .{part}").all_text_contents() for part in ("label", "percent")
    )
    return list(zip(labels, percents, strict=True))


def expected(client: httpx.Client, body: bytes, query: str = "") -> list[tuple[str, str]]:
    """Response of the API to the same image, as the page formats it."""
    classes = client.post(f"/v1/classify{query}", content=body).json()["classes"]
    shares = (entry["probability"] for entry in classes)
    percents = ("< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %" for share in shares)
    return [(entry["label"], percent) for entry, percent in zip(classes, percents, strict=True)]


def run_snippet(
    language: str, code: str, folder: Path, variables: Mapping[str, str] = {}
) -> str:
    """Run the *code* that the page shows, in *folder*; return what it prints."""
    command = {
        "curl": ["sh", "-c", code],
        "Python": [sys.executable, "-c", code],
        # playwright brings its own node
        "JavaScript": [
            str(files("playwright") / "driver" / "node"),
            "--input-type=module",
            "--eval",
            code,
        ],
    }[language]
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ran.stdout
