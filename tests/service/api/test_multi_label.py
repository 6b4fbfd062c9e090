"""A multi-label bundle: the classes above their thresholds over HTTP, in `predict`, `eval` and the client."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.client import Client
from sopdeploy.decision import Decision
from sopdeploy.errors import BundleError, DataError
from sopdeploy_service.commands.evaluate import scores_of_bundle
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service.conftest import LABELS, running, write_bundle

THRESHOLDS = (0.4, 0.6, 0.3, 0.5, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decision = Decision(activation="sigmoid", thresholds=THRESHOLDS)
    return write_bundle(tmp_path_factory.mktemp("bundles"), decision=decision)


@pytest.fixture(scope="module")
def client(bundle_path: Path) -> Iterator[httpx.Client]:
    bundle = open_bundle(bundle_path)
    with running(OnnxRuntime(bundle, threads=1), bundle, Settings()) as client:
        yield client


@pytest.fixture(scope="module")
def expected(bundle_path: Path, jpeg: bytes) -> list[tuple[str, float]]:
    """All classes with their probabilities, most probable first, from the logits."""
    bundle = open_bundle(bundle_path)
    pixels = make_decoder(Settings())(EncodedImage(jpeg), bundle.manifest.preprocess).pixels
    logits = OnnxRuntime(bundle, threads=1).run(pixels[None])["logits"][0].astype(np.float64)
    return sorted(zip(LABELS, 1 / (1 + np.exp(-logits)), strict=True), key=lambda pair: -pair[1])


def classes(response: httpx.Response) -> list[tuple[str, float]]:
    assert response.status_code == 200
    return [(entry["label"], pytest.approx(entry["probability"])) for entry in response.json()["classes"]]


def test_the_response_lists_the_classes_that_reach_their_threshold(client, jpeg, expected) -> None:
    reached = [pair for pair in expected if pair[1] >= THRESHOLDS[LABELS.index(pair[0])]]
    assert 1 < len(reached) < len(LABELS)
    for query, listed in {
        "": reached,
        "?top_k=1": reached[:1],
        "?threshold=0": expected,
        "?threshold=0&top_k=2": expected[:2],
        "?threshold=1": [],
    }.items():
        assert listed == classes(client.post(f"/v1/classify{query}", content=jpeg))
    assert client.post("/v1/classify?threshold=1.5", content=jpeg).status_code == 422


def test_info_the_client_and_predict_show_the_same_decision(
    client, bundle_path, jpeg, expected, run_server, tmp_path
) -> None:
    bundle = open_bundle(bundle_path)
    reached = [label for label, value in expected if value >= THRESHOLDS[LABELS.index(label)]]
    (tmp_path / "a.jpg").write_bytes(jpeg)
    with Client(str(client.base_url)) as asking:
        assert asking.info().models[0].thresholds == dict(zip(LABELS, THRESHOLDS, strict=True))
        assert [one.label for one in asking.classify(jpeg).classes] == reached
        assert len(asking.classify(jpeg, threshold=0.0).classes) == len(LABELS)
    for settings, listed in ((Settings(threads=1), reached), (Settings(threads=1, top_k=1), reached[:1])):
        (found,) = predict_files(bundle_path, [tmp_path / "a.jpg"], settings)
        assert [one.label for one in found.classes] == listed
        with run_server(OnnxRuntime(bundle, threads=1), bundle, settings) as server:
            answer = server.post("/v1/classify", content=jpeg).json()
        assert [one["label"] for one in answer["classes"]] == listed


def test_an_evaluation_with_labels_csv_has_the_probabilities_of_the_server(
    client, bundle_path, make_picture, tmp_path
) -> None:
    colors = {"ant|bee": (200, 30, 60), "": (90, 160, 30), "cat": (10, 90, 220), "gnu|cat": (200, 200, 20)}
    lines = ["file,classes"]
    for number, (shown, color) in enumerate(colors.items()):
        (tmp_path / f"{number}.jpg").write_bytes(make_picture(color))
        lines.append(f"{number}.jpg,{shown}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    settings = Settings(threads=1)
    names, ours, _ = scores_of_bundle(bundle_path, tmp_path, settings=settings, on_image=lambda *_: None)
    for number, row in enumerate(ours.probabilities):
        body = (tmp_path / f"{number}.jpg").read_bytes()
        listed = client.post("/v1/classify?threshold=0", content=body).json()["classes"]
        assert {one["label"]: one["probability"] for one in listed} == dict(zip(names, row, strict=True))
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"holds no class folders and no labels\.csv"):
        scores_of_bundle(bundle_path, tmp_path, settings=settings, on_image=lambda *_: None)


def test_a_bundle_with_too_few_thresholds_is_rejected(tmp_path) -> None:
    decision = Decision(activation="sigmoid", thresholds=(0.5,))
    with pytest.raises(BundleError, match="1 thresholds for 7 classes"):
        open_bundle(write_bundle(tmp_path, decision=decision))
