"""Predictions are counted by class, and told as shares of a day beside the days before."""

import logging
import re

import pytest
from prometheus_client import generate_latest

from sopdeploy.bundle.decision import Answer, Decision, Rejection
from sopdeploy_service.observability import predictions
from sopdeploy_service.observability.metrics import MAX_COUNTED_CLASSES, OTHER, Metrics
from sopdeploy_service.observability.predictions import DailyShares
from sopdeploy_service.settings import Settings
from tests.support.service import LABELS, deciding, running

HOUR = 3600.0
ZEROS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
PIXELS = {"inputs": [ZEROS]}


def counts(page: str, metric: str) -> dict[str, float]:
    """Values of the series of *metric* by their labels, without those at 0."""
    found = re.findall(rf"^{metric}\{{(.*)\}} (\S+)$", page, re.MULTILINE)
    return {labels: float(value) for labels, value in found if float(value)}


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_predictions_of_v1_and_v2_are_counted_alike(
    bundle, onnx_runtime, jpeg, threshold: float
) -> None:
    rejecting = deciding(bundle, Decision(rejection=Rejection(threshold=threshold)))
    with running(onnx_runtime, rejecting, Settings()) as client:
        page = client.get("/metrics").text
        assert len(re.findall(r"^sopdeploy_predictions_total\{.*\} 0\.0$", page, re.M)) == 7

        label = client.post("/v1/classify", content=jpeg).json()["classes"][0]["label"]
        reply = client.post("/v2/models/tiny/infer", json=PIXELS)
        assert reply.status_code == 200

        page = client.get("/metrics").text
        (model,) = client.get("/info").json()["models"]

        # One of several processes does not know what the others have predicted.
        cells = memoryview(bytearray(16)).cast("q")
        client.app.state.service.share_admitted(cells, 1)
        (of_several,) = client.get("/info").json()["models"]
    assert not {"last_day", "days_before"} & set(of_several)

    found = counts(page, "sopdeploy_predictions_total")
    digest = model["id"]
    assert found[f'digest="{digest}",label="{label}",model="tiny"'] >= 1
    assert sum(found.values()) == 2
    assert counts(page, "sopdeploy_confidence_count") == {f'digest="{digest}",model="tiny"': 2}

    num_unknown = 2 if threshold > 0 else 0
    assert sum(counts(page, "sopdeploy_unknown_images_total").values()) == num_unknown
    assert (model["last_day"]["num_images"], model["days_before"]["num_images"]) == (2, 0)
    assert model["last_day"]["unknown"] == num_unknown / 2
    assert sum(model["last_day"]["labels"].values()) == 1


def test_several_classes_per_image_are_not_counted(bundle, onnx_runtime, jpeg) -> None:
    several = deciding(bundle, Decision(activation="sigmoid", thresholds=(0.5,) * len(LABELS)))
    with running(onnx_runtime, several, Settings()) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        assert "sopdeploy_predictions_total{" not in client.get("/metrics").text
        (model,) = client.get("/info").json()["models"]

    assert not {"last_day", "days_before"} & set(model)


def test_the_number_of_series_is_bounded() -> None:
    labels = [f"class {number}" for number in range(1_000)]
    metrics = Metrics()
    metrics.create_predictions("m", "one", labels, rejects=False)
    for index in (0, MAX_COUNTED_CLASSES - 1, MAX_COUNTED_CLASSES, 999):
        metrics.count_prediction("m", "one", labels, Answer(ranked=((index, 0.7),)))
    page = generate_latest(metrics.registry).decode()

    assert page.count("sopdeploy_predictions_total{") == MAX_COUNTED_CLASSES + 1
    assert counts(page, "sopdeploy_predictions_total") == {
        'digest="one",label="class 0",model="m"': 1,
        f'digest="one",label="class {MAX_COUNTED_CLASSES - 1}",model="m"': 1,
        f'digest="one",label="{OTHER}",model="m"': 2,
    }


def test_a_day_is_told_once_beside_the_days_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shares = DailyShares()
    now = [1_000_000 * HOUR]
    monkeypatch.setattr(predictions.time, "time", lambda: now[0])

    # Nine days of hats, one of ten images unknown, then one of shoes, all unknown.
    for hour in range(24 * 10):
        now[0] = (1_000_000 + hour) * HOUR
        for number in range(10):
            is_new = hour >= 24 * 9
            label = "shoe" if is_new else "hat"
            shares.count("m", "one", label, is_unknown=is_new or number == 0)

    last_day, before = shares.describe("m", "one")
    assert last_day.num_images == 240
    assert last_day.labels == {"shoe": 1}
    assert last_day.unknown == 1
    assert before.num_images == 24 * 70
    assert before.labels == {"hat": 1}
    assert before.unknown == 0.1
    assert len(caplog.records) == 9
    assert (
        len(shares._hours["m", "one"]) <= 24 * 9
    )  # of the last line; nothing grows without end

    now[0] += 24 * HOUR
    assert [one.num_images for one in shares.describe("m", "one")] == [0, 24 * 70]
    assert [one.num_images for one in shares.describe("unused", "one")] == [0, 0]

    # A promoted bundle is not compared with the one before.
    shares.count("m", "two", "boot", is_unknown=False)
    assert [one.num_images for one in shares.describe("m", "two")] == [1, 0]
