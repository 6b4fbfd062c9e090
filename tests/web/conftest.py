"""Written pages on a local server, in one Chromium."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.decision import Decision, Rejection, Stability, Variant
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.web import runtime, site
from sopdeploy_export.web.chromium import PageReport
from tests.service.api.pages.conftest import chromium, open_page  # noqa: F401 - fixtures
from tests.service.conftest import write_bundle

RULES = Preprocess(resize=61, crop=32, interpolation="bicubic")


def tiny(
    folder: Path, rules: Preprocess = RULES, *, seed: int = 0, margin: float | None = 0.5, **decision: Any
) -> Bundle:
    """A bundle of the network of mean colors with all rules of an answer."""
    rest = {"preprocess": rules, "seed": seed, "decision": Decision(**decision)}
    bundle = open_bundle(write_bundle(folder, golden=True, **rest))
    variant = Variant(name="another decoder", num_flips=0, largest=0.1)
    counts: dict[str, Any] = {"num_images": 100, "num_stable": 80, "num_flips": 0}
    stability = Stability(threshold=margin, level=0.95, photographs="held-out", variants=(variant,), **counts)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"stability": stability}))


KNOWN = Rejection(score="energy", threshold=4.0)


@pytest.fixture(scope="session")
def onnxruntime_web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of onnxruntime-web; without npm or its registry, the test is skipped."""
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    try:
        runtime.fetch_runtime(folder, webgpu=True)
    except RuntimeUnavailableError as problem:
        pytest.skip(str(problem))
    return folder


@pytest.fixture
def linked_runtime(onnxruntime_web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Link these files instead of a download."""

    def link(folder: Path, *, webgpu: bool) -> None:
        for file in onnxruntime_web.iterdir():
            (folder / file.name).symlink_to(file)

    monkeypatch.setattr(site, "fetch_runtime", link)


class Handler(SimpleHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def check_tab(chromium: Any) -> Iterator[Any]:  # noqa: F811 - the fixture
    context = chromium.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def replay(check_tab: Any, served: str) -> Callable[[Path], PageReport]:
    """`replay(folder)` opens the check page of the *folder* in `tmp_path`, as `sopdeploy web` does."""

    def run(folder: Path) -> PageReport:
        with check_tab.expect_request("**/report") as sent:
            check_tab.goto(f"{served}/{folder.name}/check.html#report")
        return PageReport.model_validate_json(sent.value.post_data)

    return run
