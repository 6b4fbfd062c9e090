"""Drift of served predictions in `/metrics`."""

import re
from dataclasses import replace

import numpy as np
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.decision import Decision, Reference
from sopdeploy.errors import BundleError
from sopdeploy.evaluation.drift import PredictionCounts
from sopdeploy_service.observability import metrics
from sopdeploy_service.settings import Settings


def values(page: str, metric: str) -> dict[str, float]:
    pattern = rf'^sopdeploy_{metric}{{model="tiny",of="(\w+)"}} (\S+)$'
    return {of: float(value) for of, value in re.findall(pattern, page, re.MULTILINE)}


def reference(classes: int) -> Reference:
    """Predictions of the first class only, with confidences of 0.99."""
    counts = PredictionCounts(classes)
    counts.add(np.zeros(500, np.intp), np.full(500, 0.99))
    return counts.reference()


def test_a_full_window_that_differs_from_the_held_out_images_shows_drift(
    bundle, onnx_runtime, run_server, jpeg, monkeypatch
):
    monkeypatch.setattr(metrics, "WINDOW_IMAGES", 20)
    decision = Decision(reference=reference(7))
    compared = replace(bundle, manifest=bundle.manifest.model_copy(update={"decision": decision}))
    files = [("image", ("x.jpg", jpeg))] * 10
    with run_server(onnx_runtime, compared, Settings()) as client:
        client.post("/v1/classify", files=files)
        before = values(client.get("/metrics").text, "drift_distance")
        client.post("/v1/classify", files=files)
        page = client.get("/metrics").text
    assert before.keys() == {"classes", "confidences"}
    assert np.isnan(list(before.values())).all()
    assert values(page, "drift_distance") == {"classes": 1.0, "confidences": 1.0}
    assert all(value < 1e-6 for value in values(page, "drift_p_value").values())


def test_a_bundle_without_held_out_predictions_shows_no_drift(client):
    assert "sopdeploy_drift_distance{" not in client.get("/metrics").text


def test_a_bundle_whose_held_out_predictions_have_other_classes_is_rejected(make_bundle, tmp_path):
    with pytest.raises(BundleError, match="predictions of 3 classes, not 7; export it again"):
        open_bundle(make_bundle(tmp_path, decision=Decision(reference=reference(3))))
