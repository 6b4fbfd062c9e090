"""Unknown images: `known` and `score` in responses, commands, metrics and the client."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.client import Client
from sopdeploy.decision import Decision, Rejection, Score, known_score
from sopdeploy.training.train import train_recipe
from sopdeploy_export.graph import generated_images
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.export.once import proving_once
from tests.sopdeploy.training.runs import few_digits, short_recipe

RunServer = Callable[..., AbstractContextManager[httpx.Client]]


def rejecting(bundle: Bundle, score: Score, threshold: float) -> Bundle:
    decision = Decision(rejection=Rejection(score=score, threshold=threshold))
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"decision": decision}))


def test_an_image_is_known_if_its_score_reaches_the_threshold(
    bundle: Bundle, onnx_runtime: OnnxRuntime, run_server: RunServer, make_picture
) -> None:
    score: Score = "energy"
    pictures = [make_picture(color, size=(64, 64), kind="PNG") for color in ((250, 20, 20), (90, 90, 90))]
    with run_server(onnx_runtime, rejecting(bundle, score, -1e9), Settings()) as client:
        scores = [client.post("/v1/classify", content=picture).json()["score"] for picture in pictures]
    assert scores[0] != scores[1]
    between = rejecting(bundle, score, (scores[0] + scores[1]) / 2)
    with run_server(onnx_runtime, between, Settings()) as client:
        found = [client.post("/v1/classify", content=picture).json() for picture in pictures]
        files = [("image", ("x.png", picture)) for picture in pictures]
        several = client.post("/v1/classify", files=files).json()["results"]
        with Client(str(client.base_url)) as typed:
            answers = [typed.classify(picture) for picture in pictures]
        metrics = client.get("/metrics").text
    expected = [(one > np.mean(scores), pytest.approx(one)) for one in scores]
    assert [(one["known"], one["score"]) for one in found] == expected
    assert [(one["known"], one["score"]) for one in several] == expected
    assert [(one.known, one.score) for one in answers] == expected
    assert 'sopdeploy_unknown_images_total{model="tiny"} 3.0' in metrics


def test_a_bundle_without_threshold_answers_without_known_and_score(client: httpx.Client, jpeg) -> None:
    assert set(client.post("/v1/classify", content=jpeg).json()) == {"classes", "warnings"}
    assert "sopdeploy_unknown_images_total{" not in client.get("/metrics").text
    with Client(str(client.base_url)) as typed:
        answer = typed.classify(jpeg)
    assert (answer.known, answer.score) == (None, None)


@pytest.fixture(scope="module")
def bundle_of_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train and export a network whose label smoothing makes it underconfident; return checkpoint, bundle."""
    folder = tmp_path_factory.mktemp("known")
    with few_digits():
        best = train_recipe(short_recipe("loss.label_smoothing=0.5", "epochs=5"), folder / "run").best
    with proving_once():
        return best, export_checkpoint(
            best, folder / "bundles", options=ExportOptions(detach=True, max_batch=1)
        ).path


def test_training_export_and_predict_share_one_decision(
    bundle_of_run: tuple[Path, Path], tmp_path: Path
) -> None:
    best, path = bundle_of_run
    decision, manifest = read_checkpoint(best).decision, open_bundle(path).manifest
    assert decision is not None
    assert decision == manifest.decision
    assert decision.calibration is not None
    assert decision.rejection is not None
    assert decision.calibration.temperature < 1
    assert decision.calibration.error_after < decision.calibration.error_before
    for page in ("README.md", "report.html"):
        assert f"{decision.calibration.temperature:.4g}" in (path / page).read_text(encoding="utf-8"), page
    images = [tmp_path / f"{number}.png" for number in range(12)]
    for image, pixels in zip(images, generated_images(manifest.preprocess.crop), strict=True):
        Image.fromarray(pixels).save(image)
    arguments = ["predict", str(path), *map(str, images)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    logits = read_probes(path / "probes.npz").expected["logits"]
    scores = known_score(logits, decision.rejection.score)
    assert [one["score"] for one in found] == pytest.approx(scores.tolist(), rel=1e-3)
    assert [one["known"] for one in found] == [one["score"] >= decision.rejection.threshold for one in found]
    text = CliRunner().invoke(app, arguments).stdout
    assert text.count("none of these classes") == sum(not one["known"] for one in found)
