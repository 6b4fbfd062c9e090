"""Unknown images and several classes per image: over HTTP, in commands, metrics and the client."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.decision import Decision, Rejection, log_sum_exp
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.client import Client
from sopdeploy.errors import BundleError
from sopdeploy.images.decode import decode
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy_commands.app import app
from sopdeploy_commands.predict import predict
from sopdeploy_commands.scores import scores_of_bundle
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.options import ExportOptions
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.export.once import proving_once
from tests.sopdeploy.training.runs import few_digits, short_recipe
from tests.support.service import LABELS, deciding, picture_bytes, running, write_bundle


def rejecting(bundle: Bundle, threshold: float) -> Bundle:
    return deciding(bundle, Decision(rejection=Rejection(threshold=threshold)))


def test_an_image_is_known_if_its_score_reaches_the_threshold(
    bundle: Bundle, onnx_runtime: OnnxRuntime
) -> None:
    pictures = [
        picture_bytes(color, size=(64, 64), kind="PNG")
        for color in ((250, 20, 20), (90, 90, 90))
    ]

    with running(onnx_runtime, rejecting(bundle, -1e9), Settings()) as client:
        scores = [
            client.post("/v1/classify", content=picture).json()["score"] for picture in pictures
        ]

    assert scores[0] != scores[1]
    between = rejecting(bundle, (scores[0] + scores[1]) / 2)
    with running(onnx_runtime, between, Settings()) as client:
        found = [client.post("/v1/classify", content=picture).json() for picture in pictures]
        files = [("image", ("x.png", picture)) for picture in pictures]
        several = client.post("/v1/classify", files=files).json()["results"]
        with Client(str(client.base_url)) as typed:
            answers = [typed.classify(picture) for picture in pictures]
        metrics = client.get("/metrics").text
        (model,) = client.get("/info").json()["models"]

    expected = [(one > np.mean(scores), pytest.approx(one)) for one in scores]
    assert [(one["known"], one["score"]) for one in found] == expected
    assert [(one["known"], one["score"]) for one in several] == expected
    assert [(one.known, one.score) for one in answers] == expected
    series = f'sopdeploy_unknown_images_total{{digest="{model["id"]}",model="tiny"}}'
    assert f"{series} 3.0" in metrics


def test_a_bundle_without_threshold_answers_without_known_and_score(
    client: httpx.Client, jpeg
) -> None:
    assert set(client.post("/v1/classify", content=jpeg).json()) == {"classes", "warnings"}
    assert "sopdeploy_unknown_images_total{" not in client.get("/metrics").text

    with Client(str(client.base_url)) as typed:
        answer = typed.classify(jpeg)
    assert answer.known is None
    assert answer.score is None


@pytest.fixture(scope="module")
def bundle_of_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train and export a network; return checkpoint, bundle.

    Label smoothing makes it underconfident. Half of the known images are below its threshold.
    """
    folder = tmp_path_factory.mktemp("known")
    with few_digits():
        best = train_recipe(
            short_recipe("loss.label_smoothing=0.5", "rejection.accepts=0.5", "epochs=5"),
            folder / "run",
        ).best
    with proving_once():
        return best, export_checkpoint(
            best, folder / "bundles", options=ExportOptions(detach=True, max_batch=1)
        ).path


def test_training_export_and_predict_share_one_decision(
    bundle_of_run: tuple[Path, Path], tmp_path: Path
) -> None:
    best, path = bundle_of_run
    decision = read_checkpoint(best).decision
    manifest = open_bundle(path).manifest
    assert decision is not None
    assert decision == manifest.decision
    assert decision.calibration is not None
    assert decision.rejection is not None
    assert decision.calibration.temperature < 1
    assert decision.calibration.loss_after < decision.calibration.loss_before
    assert f"{decision.calibration.temperature:.4g}" in (path / "README.md").read_text(
        encoding="utf-8"
    )

    images = []
    for number, pixels in enumerate(generated_images(manifest.preprocess.crop)):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(images[-1])
    arguments = ["predict", str(path), *map(str, images)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    logits = read_probes(open_bundle(path)).expected["logits"]
    scores = log_sum_exp(logits)

    assert [one["score"] for one in found] == pytest.approx(scores.tolist(), rel=1e-3)
    assert [one["known"] for one in found] == [
        one["score"] >= decision.rejection.threshold for one in found
    ]

    text = CliRunner().invoke(app, arguments).stdout
    assert text.count("looks unlike") == [one["known"] for one in found].count(False) > 0


THRESHOLDS = (0.4, 0.6, 0.3, 0.5, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def multi_label_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decision = Decision(activation="sigmoid", thresholds=THRESHOLDS)
    return write_bundle(tmp_path_factory.mktemp("bundles"), decision=decision)


@pytest.fixture(scope="module")
def many(multi_label_path: Path) -> Iterator[httpx.Client]:
    bundle = open_bundle(multi_label_path)
    with running(OnnxRuntime(bundle, Settings(threads=1)), bundle, Settings()) as many:
        yield many


@pytest.fixture(scope="module")
def expected(multi_label_path: Path, jpeg: bytes) -> list[tuple[str, float]]:
    """All classes with their probabilities, most probable first, from the logits."""
    bundle = open_bundle(multi_label_path)
    rules = bundle.manifest.preprocess
    pixels = decode(jpeg, rules, max_bytes=10**7, max_pixels=10**7).pixels
    logits = (
        OnnxRuntime(bundle, Settings(threads=1))
        .run(pixels[None])["logits"][0]
        .astype(np.float64)
    )
    return sorted(
        zip(LABELS, 1 / (1 + np.exp(-logits)), strict=True), key=lambda pair: -pair[1]
    )


def classes(response: httpx.Response) -> list[tuple[str, float]]:
    assert response.status_code == 200
    return [
        (entry["label"], pytest.approx(entry["probability"]))
        for entry in response.json()["classes"]
    ]


def test_the_response_lists_the_classes_that_reach_their_threshold(
    many, jpeg, expected
) -> None:
    reached = [pair for pair in expected if pair[1] >= THRESHOLDS[LABELS.index(pair[0])]]
    assert 1 < len(reached) < len(LABELS)
    for query, listed in {
        "": reached,
        "?top_k=1": reached[:1],
        "?threshold=0": expected,
        "?threshold=0&top_k=2": expected[:2],
        "?threshold=1": [],
    }.items():
        assert listed == classes(many.post(f"/v1/classify{query}", content=jpeg))

    assert many.post("/v1/classify?threshold=1.5", content=jpeg).status_code == 422


def test_info_the_client_and_predict_show_the_same_decision(
    many, multi_label_path, jpeg, expected, tmp_path
) -> None:
    reached = [label for label, value in expected if value >= THRESHOLDS[LABELS.index(label)]]
    (tmp_path / "a.jpg").write_bytes(jpeg)
    with Client(str(many.base_url)) as asking:
        assert asking.info().models[0].thresholds == dict(zip(LABELS, THRESHOLDS, strict=True))
        assert [one.label for one in asking.classify(jpeg).classes] == reached
        assert len(asking.classify(jpeg, threshold=0.0).classes) == len(LABELS)

    for top_k, listed in ((None, reached), (1, reached[:1])):
        (found,) = predict(multi_label_path, tmp_path / "a.jpg", top_k=top_k, threads=1)
        assert [one.label for one in found.classes] == listed


def test_an_evaluation_with_labels_csv_has_the_probabilities_of_the_server(
    many, multi_label_path, tmp_path
) -> None:
    colors = {
        "ant|bee": (200, 30, 60),
        "": (90, 160, 30),
        "cat": (10, 90, 220),
        "gnu|cat": (200, 200, 20),
    }
    lines = ["file,classes"]
    for number, (shown, color) in enumerate(colors.items()):
        (tmp_path / f"{number}.jpg").write_bytes(picture_bytes(color))
        lines.append(f"{number}.jpg,{shown}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    settings = Settings(threads=1)
    names, ours, *_ = scores_of_bundle(
        multi_label_path, tmp_path, settings=settings, on_image=lambda *_: None
    )

    for number, row in enumerate(ours.probabilities):
        body = (tmp_path / f"{number}.jpg").read_bytes()
        listed = many.post("/v1/classify?threshold=0", content=body).json()["classes"]
        assert {one["label"]: one["probability"] for one in listed} == dict(
            zip(names, row, strict=True)
        )


def test_a_bundle_with_too_few_thresholds_is_rejected(tmp_path) -> None:
    decision = Decision(activation="sigmoid", thresholds=(0.5,))
    with pytest.raises(BundleError, match="1 thresholds for 7 classes"):
        open_bundle(write_bundle(tmp_path, decision=decision))
