"""Open the check page of a written folder in a headless Chromium, and receive its report."""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.errors import ParityError, RuntimeUnavailableError

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = ("--headless", "--no-first-run", "--disable-background-networking")
_SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")  # WebGPU on the processor
_SECONDS = 600  # for all examples


class PageReport(StrictModel):
    """What the check page found: the first failure of `steps` replayed ones, or an empty text.

    `ms` are the milliseconds of each golden example, for its pixels and for the network.
    """

    failure: str
    steps: int
    ms: tuple[tuple[float, float], ...]


def find_chromium(given: str | None = None) -> str:
    """Find the program *given*, or a Chromium; raises `RuntimeUnavailableError` if there is none."""
    for name in _NAMES if given is None else (given,):
        if found := shutil.which(name):
            return found
    raise RuntimeUnavailableError(
        f"{given or 'Chromium'}: not found, and an unchecked page is not written; install Chromium",
        remedies={"browser": "PROGRAM"},
    )


def run_check(folder: Path, program: str, *, webgpu: bool) -> PageReport:
    """Serve *folder* to this machine and open its `check.html` in *program*; return the report of that page.

    With *webgpu*, the browser has WebGPU without a GPU. Raises `ParityError` if the browser gives no report.
    """
    received: list[bytes] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    Handler.extensions_map = Handler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server,
        tempfile.TemporaryDirectory(prefix="sopdeploy-", ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = [*_OPTIONS, *_SWIFTSHADER * webgpu, f"--user-data-dir={profile}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # then Chromium does not start with its sandbox
            options.append("--no-sandbox")
        url = f"http://127.0.0.1:{server.server_port}/check.html#report"
        end = time.monotonic() + _SECONDS
        command = [program, *options, url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not received and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            process.terminate()
        server.shutdown()
    try:
        return PageReport.model_validate_json(received[0])
    except (IndexError, pydantic.ValidationError) as error:
        raise ParityError(
            f"{program}: no report of the check page; start it on this machine by hand, or name another",
            setting="browser",
        ) from error
