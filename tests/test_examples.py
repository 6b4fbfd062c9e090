"""Every file of `examples/` works as its first lines say, and the page links to it."""

import csv
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sopdeploy
from sopdeploy.base import plugins
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import OverloadedError, ServiceError, SopdeployError, UnreachableError
from sopdeploy_service.settings import Settings
from tests.docs.reading import ROOT, module_at, text_of
from tests.support.fake_runtime import FakeRuntime
from tests.support.service import LABELS, picture_bytes, running, write_bundle

FOLDER = ROOT / "examples"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of a tiny bundle."""
    bundle = open_bundle(write_bundle(tmp_path_factory.mktemp("served")))
    with running(FakeRuntime(num_classes=len(LABELS)), bundle, Settings()) as client:
        yield str(client.base_url)


def test_the_page_and_the_readme_lead_to_every_example() -> None:
    page = text_of("docs/index.md")
    files = [path for path in FOLDER.rglob("*") if path.suffix in {".py", ".ipynb"}]

    assert len(files) >= 5
    assert [
        path
        for path in files
        if f"../examples/{path.relative_to(FOLDER).as_posix()})" not in page
    ] == []
    assert "(docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_client_writes_a_line_for_every_image_of_a_folder(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "2.png"):
        (tmp_path / name).write_bytes(picture_bytes())
    (tmp_path / "3.jpg").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path), url])
    runpy.run_path(str(FOLDER / "client.py"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    assert [row["image"] for row in rows] == ["2.png", "3.jpg", "a/1.png"]
    assert [row["class"] in LABELS for row in rows] == [True, False, True]
    assert [bool(row["error"]) for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("body", "status", "key"),
    [(picture_bytes(), "200 OK", "class"), (b"no image", "400 Bad Request", "error")],
)
def test_the_web_application_answers_like_the_server(
    body: bytes, status: str, key: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPDEPLOY_URL", url)
    example = module_at(FOLDER / "gunicorn_app.py")
    started = []
    environ = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
    (answer,) = example.app(environ, lambda *response: started.append(response))
    example.client().close()

    assert started == [(status, [("Content-Type", "application/json")])]
    assert key in json.loads(answer)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("full", code="overloaded", status=429), "503 Service Unavailable"),
        (UnreachableError("no answer", status=0), "503 Service Unavailable"),
        (ServiceError("no image", code="not_an_image", status=415), "400 Bad Request"),
    ],
)
def test_the_web_application_blames_the_photograph_only_for_its_own_errors(
    error: SopdeployError, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = module_at(FOLDER / "gunicorn_app.py")
    started = []

    def classify(_body: bytes) -> None:
        raise error

    monkeypatch.setattr(example, "client", lambda: SimpleNamespace(classify=classify))
    environ = {"CONTENT_LENGTH": "1", "wsgi.input": io.BytesIO(b"x")}
    (answer,) = example.app(environ, lambda *response: started.append(response[0]))
    assert started == [status]
    assert json.loads(answer) == {"error": str(error)}


def test_the_pooling_of_the_plug_in_trains_its_exponent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins.POOLINGS, "registered", {})
    module_at(FOLDER / "power_mean" / "power_mean.py")
    network = sopdeploy.create_model("resnet8", num_classes=3, pooling="power-mean")
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    powers = {
        name: value for name, value in network.named_parameters() if name.endswith(".power")
    }

    assert [(float(value.detach()), bool(value.grad)) for value in powers.values()] == [
        (3.0, True)
    ]


@pytest.mark.nightly
def test_an_own_network_is_exported_with_proof_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", FOLDER / "own_network.py"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("trained = detached = plain")

    assert (tmp_path / "bundles" / "latest" / "model.onnx").is_file()


NOTEBOOK = json.loads((FOLDER / "photographs.ipynb").read_bytes())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_output() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_notebook_runs_from_the_first_to_the_last_cell_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    shutil.copytree(FOLDER / "photos", tmp_path / "photos")
    for _ in range(2):
        names: dict[str, Any] = {}
        with chdir(tmp_path):
            for cell in CELLS:
                exec(compile(cell, "photographs.ipynb", "exec"), names)  # noqa: S102
        assert names["right"] >= 8
        assert sum(answer.known is False for answer in names["answers"]) >= 8

    assert "trained = plain" in capsys.readouterr().out
