"""Settings, answers, runtimes, timings: each alone."""

import numpy as np
import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.loader import largest_batch
from sopdeploy_service.inference.results import Ranking, format_prediction, softmax
from sopdeploy_service.observability.metrics import BusyMeter
from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings, load_settings


def test_settings_come_from_keywords_then_the_environment_then_the_defaults(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_PORT", "9000")
    monkeypatch.setenv("SOPDEPLOY_TOP_K", "3")
    settings = load_settings(port=7000, top_k=None)
    assert (settings.port, settings.top_k, settings.max_images) == (7000, 3, 32)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": 70_000}, "port"),
        ({"prot": 1}, "prot: unknown key"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"max_images": 20, "queue_size": 10}, "max_images"),
        ({"decoders": 0}, "decoders"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(given, named):
    with pytest.raises(ConfigError, match=named):
        load_settings(**given)


def test_a_wrong_setting_in_the_environment_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ConfigError, match="port"):
        load_settings()


def test_probabilities_are_those_of_the_softmax_and_sum_to_one():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    expected = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    np.testing.assert_allclose(softmax(logits), expected, rtol=1e-12)
    assert softmax(logits).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("logits", [[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e-45, 0.0, -1e-45]])
def test_extreme_logits_give_probabilities(logits):
    found = softmax(np.array(logits, np.float32))
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "top_k", "labels"),
    [
        ([1, 3, 2], 3, ["b", "c", "a"]),
        ([1, 3, 2], 1, ["b"]),
        ([2, 2, 2], 2, ["a", "b"]),
        ([0, 5, 5], 99, ["b", "c", "a"]),
        ([100, 90, 80], 2, ["a", "b"]),
    ],
)
def test_the_best_classes_come_first_and_ties_keep_the_order_of_the_labels(logits, top_k, labels):
    found = format_prediction(Ranking([np.array(logits, np.float32)]).top_k(0, top_k), ["a", "b", "c"])
    assert [entry["label"] for entry in found["classes"]] == labels


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [("cpu", None, 4), ("cpu", 16, 16), ("cpu", 100, 64), ("cuda:0", None, 64), ("cuda:0", 2, 2)],
)
def test_the_largest_batch_is_small_on_a_cpu_and_never_above_the_verified(device, wanted, expected):
    runtime = FakeRuntime(classes=2, largest_batch=64, device=device)
    assert largest_batch(runtime, Settings(max_batch=wanted)) == expected


def test_the_pretend_runtime_is_deterministic_whatever_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    runtime = FakeRuntime(classes=5)
    together = runtime.run(images)["logits"]
    alone = np.concatenate([runtime.run(image[None])["logits"] for image in images])
    assert together.shape == (4, 5)
    np.testing.assert_array_equal(together, alone)


def test_the_timing_header_keeps_the_slowest_image_of_a_request():
    context = RequestContext("id")
    context.record_stage("decode", 0.001)
    context.record_stage("decode", 0.003)
    context.record_stage("infer", 0.0125)
    assert context.server_timing() == "decode;dur=3.00, infer;dur=12.50"


def test_the_busy_meter_is_a_share_between_0_and_1(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    meter = BusyMeter()
    now = 104.0
    meter.add(101.0, 102.0)
    meter.add(102.0, 104.0)
    assert meter.ratio() == pytest.approx(0.75)
    now = 113.0
    assert meter.ratio() == pytest.approx(0.1)
    now = 1000.0
    assert meter.ratio() == 0.0
