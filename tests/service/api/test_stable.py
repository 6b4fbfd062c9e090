"""Stable answers: `stable` in responses, commands, the client and the manifest."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import httpx
import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.client import Client
from sopdeploy.decision import Stability, Variant
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings

RunServer = Callable[..., AbstractContextManager[httpx.Client]]


def stability(threshold: float) -> Stability:
    variants = (Variant(name="noise", flips=1, largest=threshold),)
    return Stability(threshold=threshold, level=0.95, images=100, variants=variants, stable=80, flips=0)


@pytest.mark.parametrize(
    ("logits", "stable"),
    [([2.0, 5.0, 4.0], False), ([2.0, 5.0, 3.5], False), ([2.0, 5.0, 3.4], True), ([-1.0, -9.0], True)],
)
def test_an_answer_is_stable_above_the_threshold_of_the_margin(logits: list[float], stable: bool) -> None:
    assert stability(1.5).is_stable(np.array(logits, np.float32)) is stable


def test_responses_say_whether_the_answer_is_stable(
    bundle: Bundle, onnx_runtime: OnnxRuntime, run_server: RunServer, make_picture
) -> None:
    picture = make_picture((250, 20, 20), size=(64, 64), kind="PNG")
    for threshold, expected in ((0.0, True), (1e9, False)):
        manifest = bundle.manifest.model_copy(update={"stability": stability(threshold)})
        with run_server(onnx_runtime, replace(bundle, manifest=manifest), Settings()) as client:
            assert client.post("/v1/classify", content=picture).json()["stable"] is expected
            (model,) = client.get("/info").json()["models"]
            assert model["stable_above"] == threshold
            with Client(str(client.base_url)) as typed:
                assert typed.classify(picture).stable is expected


def test_a_bundle_without_photographs_answers_without_stable(client: httpx.Client, jpeg) -> None:
    assert "stable" not in client.post("/v1/classify", content=jpeg).json()
    with Client(str(client.base_url)) as typed:
        assert typed.classify(jpeg).stable is None


def test_a_manifest_has_the_measurement_only_if_there_is_one(bundle: Bundle) -> None:
    without = bundle.manifest.model_copy(update={"stability": None})
    measured = bundle.manifest.model_copy(update={"stability": stability(1.5)})
    assert "stability" not in json.loads(without.to_bytes())
    assert Manifest.from_bytes(without.to_bytes()) == without
    assert Manifest.from_bytes(measured.to_bytes()) == measured
    assert measured.id != without.id
