"""Files written by sopdeploy 0.1.0 still work: a checkpoint of DSoP on 8 x 8 digits, and its bundle."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests import quick_torch
from tests.export.once import proving_once

FOLDER = Path(__file__).parent / "version-0.1.0"
BUNDLE = FOLDER / "bundle" / "dsop-resnet8-5c125ff36a3e"
VERSIONS = json.loads((BUNDLE / "manifest.json").read_bytes())["versions"]
SAME_EXPORTER = pytest.mark.skipif(
    (torch.__version__, onnx.__version__) != (VERSIONS["torch"], VERSIONS["onnx"]),
    reason="another version of torch or onnx may write other bytes",
)


def test_the_checkpoint_opens() -> None:
    checkpoint = read_checkpoint(FOLDER / "best.pt")
    network = build_classifier(checkpoint, FOLDER / "best.pt")
    assert (checkpoint.model, checkpoint.training["epoch"], network.training) == ("dsop-resnet8", 2, False)


@SAME_EXPORTER
def test_the_checkpoint_exports_to_the_same_graph(tmp_path: Path) -> None:
    arguments = ["export", str(FOLDER / "best.pt"), "--detach", "--out", str(tmp_path)]
    quick_torch.keep()
    with proving_once():
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    exported = tmp_path / (tmp_path / "latest").readlink()
    for name in ("model.onnx", "labels.json", "certificate.json", "probes.npz"):
        assert (exported / name).read_bytes() == (BUNDLE / name).read_bytes(), name
    assert open_bundle(exported).manifest.lineage == open_bundle(BUNDLE).manifest.lineage


def test_the_bundle_verifies() -> None:
    result = CliRunner().invoke(app, ["verify", str(BUNDLE)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "verified" in result.stdout


def test_the_bundle_predicts_its_probes_over_http() -> None:
    probes, settings = read_probes(BUNDLE / "probes.npz"), Settings()
    logits = probes.expected["logits"].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    with TestClient(create_app({"digits": load_model(BUNDLE, settings)}, settings)) as client:
        for image, probabilities in zip(probes.images, expected, strict=True):
            body = io.BytesIO()
            Image.fromarray(image).save(body, "PNG")
            response = client.post("/v1/classify", params={"top_k": 10}, content=body.getvalue())
            assert response.status_code == 200, response.text
            found = {row["label"]: row["probability"] for row in response.json()["classes"]}
            assert found == pytest.approx(
                dict(zip(map(str, range(10)), probabilities, strict=True)), abs=1e-4
            )
