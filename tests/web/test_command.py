"""`sopdeploy web`: what it writes, and what it refuses with one line and without a trace."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.errors import BundleError, ParityError, RuntimeUnavailableError
from sopdeploy_export.web import runtime, site
from sopdeploy_export.web.chromium import PageReport, find_chromium
from sopdeploy_export.web.runtime import fetch_runtime
from sopdeploy_export.web.site import write_site
from tests.web.conftest import tiny


def program(folder: Path, name: str, script: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


@pytest.mark.browser
@pytest.mark.usefixtures("linked_runtime")
def test_a_page_for_gpus_is_also_replayed_with_webgpu(tmp_path: Path) -> None:
    command = ["web", str(tiny(tmp_path / "bundles").path), "--out", str(tmp_path / "site"), "--webgpu"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 25
    first_visit = (tmp_path / "site" / "worker.js").read_text().partition("\n")[0]
    assert "ort.wasm.min.mjs" in first_visit
    assert "asyncify" not in first_visit  # only browsers with a GPU load these 27 MB


@pytest.mark.browser
@pytest.mark.usefixtures("linked_runtime")
def test_the_command_writes_a_page_that_replays_and_its_time(tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "bundles")
    command = ["web", str(bundle.path), "--out", str(tmp_path / "pages" / "site")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert (written["bundle"], written["steps"]) == (bundle.path.name, 24)
    assert written["ms_pixels"] > 0
    assert written["ms_network"] > 0
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["site"]
    worker = (tmp_path / "pages" / "site" / "worker.js").read_text()
    assert "index.html" in worker.partition("\n")[0]

    again = CliRunner().invoke(app, command)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "site: exists; remove it or choose another folder" in again.stderr


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60"], ids=["ends", "waits"])
def test_a_browser_without_a_report_leaves_nothing_behind(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sopdeploy_export.web.chromium._SECONDS", 0.2)
    browser = program(tmp_path, "browser", script)
    with pytest.raises(ParityError, match="browser: no report of the check page; start it"):
        write_site(tiny(tmp_path / "bundles"), tmp_path / "pages" / "site", str(browser))
    assert not (tmp_path / "pages").exists()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "fetch_runtime", lambda _, webgpu: None)


def test_without_chromium_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RuntimeUnavailableError, match="Chromium: not found, and an unchecked page is not written"
    ):
        find_chromium()
    with pytest.raises(RuntimeUnavailableError, match="absent: not found"):
        find_chromium("absent")


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"precision": "fp16"}, "browsers do not run fp16"), ({"files": {}}, "has no golden examples")],
)
def test_bundles_that_a_browser_cannot_replay_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    bundle = tiny(tmp_path / "bundles")
    object.__setattr__(bundle, "manifest", bundle.manifest.model_copy(update=change))
    with pytest.raises(BundleError, match=message):
        write_site(bundle, tmp_path / "site", str(program(tmp_path, "browser", "exit 1")))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "npm, which downloads onnxruntime-web, was not found"),
        (
            "echo 'E404 not found' >&2; exit 1",
            r"cannot be|cannot download onnxruntime-web .* \(E404 not found\)",
        ),
        ("exit 0", "it wrote no file"),
        (f"echo other > onnxruntime-web-{runtime.VERSION}.tgz", "is not the published file"),
    ],
    ids=["no npm", "no package", "no file", "another file"],
)
def test_only_the_published_package_is_used(
    script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program(tmp_path, "npm", script)
    (tmp_path / "site").mkdir()
    with pytest.raises(RuntimeUnavailableError, match=message):
        fetch_runtime(tmp_path / "site", webgpu=False)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            PageReport(failure="a.jpg: the step `resize` fails", steps=24, ms=()),
            "a.jpg: the step `resize` fails; nothing",
        ),
        (PageReport(failure="", steps=23, ms=()), "23 of 24 steps were replayed; nothing was written"),
    ],
)
def test_a_failure_or_a_missing_step_leaves_nothing_behind(
    found: PageReport, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "run_check", lambda folder, program, webgpu: found)
    with pytest.raises(ParityError, match=message):
        write_site(tiny(tmp_path / "bundles"), tmp_path / "site", str(program(tmp_path, "browser", "exit 1")))
    assert not (tmp_path / "site").exists()
