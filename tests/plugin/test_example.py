"""The example package is found, trained, exported with proof and served without a change of this project."""

import re
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner, Result

from sopdeploy import plugins
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.checkpoint import Checkpoint, read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.errors import ConfigError
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings
from tests.docs.reading import ROOT, blocks, command_lines
from tests.pictures import encoded

PAGE = ROOT / "CONTRIBUTING.md"
(RECIPE,) = blocks(PAGE, "toml")
EXAMPLE = {"sopdeploy-example": "1.2.0"}
POOLING = ("model.config.pooling.kind=std", "model.config.pooling.eps=1e-4")


@pytest.fixture(autouse=True)
def _with_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "on")


def sopdeploy(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return result


def train(out: Path, *assignments: str) -> Checkpoint:
    recipe = out.parent / "stripes.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    (typed,) = [words for words in command_lines(PAGE) if "stripes.toml" in words]
    settings = [word for assignment in assignments for word in ("--set", assignment)]
    sopdeploy(*(recipe if word == recipe.name else word for word in typed), *settings, "--out", out)
    return read_checkpoint(out / "best.pt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("example") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugins.VARIABLE, "on")
        train(run, "model.name=std-resnet8")
    return run / "best.pt"


def test_contributing_shows_the_code_of_the_example() -> None:
    folder = ROOT / "tests" / "plugin" / "sopdeploy_example"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    code = re.sub(r' *"""[^"]*"""\n\n?', "", code)
    shown = [block for block in blocks(PAGE, "text") if block.startswith("class Std")]
    shown += [block for block in blocks(PAGE, "text") if block.startswith("class Stripes")]
    parts = [part for block in shown for part in block.strip().split("\n\n\n")]
    assert len(parts) == 4
    assert [part for part in parts if part not in code] == []


def test_models_and_env_list_its_network_and_its_modules() -> None:
    lines = sopdeploy("models").stdout.splitlines()
    assert lines[lines.index("Networks of plug-ins") + 1].startswith("std-resnet8 ")
    (line,) = [line for line in sopdeploy("env").stdout.splitlines() if "sopdeploy-example 1.2.0" in line]
    assert {"sopdeploy_example.training", "sopdeploy_example.serving"} <= {*line.replace(",", "").split()}


def test_a_checkpoint_names_the_version_of_the_package(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint)
    assert (found.model, found.labels) == ("std-resnet8", ("horizontal", "vertical"))
    assert found.training["plugins"] == EXAMPLE
    data = found.training["recipe"]["data"]
    assert {name: data[name] for name in ("kind", "count", "classes")} == {
        "kind": "stripes", "count": 8, "classes": None
    }  # fmt: skip


def test_a_network_of_the_catalog_is_trained_with_its_pooling(tmp_path: Path) -> None:
    found = train(tmp_path / "run", "model.name=resnet8", *POOLING)
    assert found.config["pooling"] == {"kind": "std", "eps": 1e-4}
    assert found.training["plugins"] == EXAMPLE


def test_its_network_is_exported_with_proof_verified_and_served_by_its_runtime(
    checkpoint: Path, tmp_path: Path
) -> None:
    output = sopdeploy("export", checkpoint, "--max-batch", 4, "--out", tmp_path).stdout
    assert "trained = plain" in output
    sopdeploy("verify", tmp_path / "latest")
    bundle = open_bundle(tmp_path / "latest")
    assert bundle.manifest.versions.items() >= EXAMPLE.items()
    settings = Settings(runtime="onnx-reference", threads=1)
    loaded = load_model(bundle.path, settings)
    stripes = np.broadcast_to(np.array([[0], [255]] * 8, dtype=np.uint8), (16, 16))
    with TestClient(create_app({"stripes": loaded}, settings), "http://localhost") as client:
        answer = client.post("/v1/classify", content=encoded(Image.fromarray(stripes))).json()
        (served,) = client.get("/info").json()["models"]
    assert {entry["label"] for entry in answer["classes"]} == {"horizontal", "vertical"}
    assert served["runtime"].split()[0] == "onnx-reference"


def test_switched_off_it_is_not_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "off")
    for registry in (plugins.MODELS, plugins.RUNTIMES):  # as in a new process
        monkeypatch.setattr(registry, "registered", {})
    assert "std-resnet8" not in sopdeploy("models").stdout
    assert "sopdeploy-example" not in sopdeploy("env").stdout
    result = CliRunner().invoke(app, ["export", str(checkpoint)])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "model 'std-resnet8' is not in the catalog" in result.stderr
    with pytest.raises(ConfigError, match=r"runtime: .*choose from"):
        load_settings(runtime="onnx-reference")
