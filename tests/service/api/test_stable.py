"""Stable answers: `stable` in responses, commands, the client and the manifest."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.golden import GOLDEN
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.client import Client
from sopdeploy.decision import Stability, Variant
from sopdeploy.errors import ParityError
from sopdeploy_service.commands.verify import verify
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.forged import forge
from tests.service.conftest import write_bundle

RunServer = Callable[..., AbstractContextManager[httpx.Client]]


def stability(threshold: float) -> Stability:
    variants = (Variant(name="noise", num_flips=1, largest=threshold),)
    return Stability(
        threshold=threshold,
        level=0.95,
        num_images=100,
        photographs="held-out",
        variants=variants,
        num_stable=80,
        num_flips=0,
    )


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


def test_a_manifest_has_the_measurement_only_if_there_is_one(bundle: Bundle) -> None:
    without = bundle.manifest.model_copy(update={"stability": None})
    measured = bundle.manifest.model_copy(update={"stability": stability(1.5)})
    assert "stability" not in json.loads(without.to_bytes())
    assert Manifest.from_bytes(without.to_bytes()) == without
    assert Manifest.from_bytes(measured.to_bytes()) == measured
    assert measured.id != without.id


def test_verify_replays_stable_golden_examples(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "a", golden=True, stability=stability(0.0))
    assert verify(path, Settings(threads=1)).stable == 3
    assert verify(write_bundle(tmp_path / "b", golden=True), Settings(threads=1)).stable is None
    index = json.loads((path / GOLDEN).read_bytes())
    index["tolerance"] = 1e9  # so that only the class of a stable example can differ
    index["examples"][0]["logits"] = [-value for value in index["examples"][0]["logits"]]
    (path / GOLDEN).write_text(json.dumps(index))
    with pytest.raises(
        ParityError, match=r"golden-0.jpg: its class is marked as stable, but it gets another"
    ):
        verify(forge(path), Settings(threads=1))
