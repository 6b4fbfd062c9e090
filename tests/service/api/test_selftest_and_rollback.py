"""`/selftest` and `/v1/models/{name}/rollback`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings


class Drifting:
    """A runtime whose outputs are off by *wrong*."""

    name, device, largest_batch = "drifting", "cpu", 4

    def __init__(self, runtime: OnnxRuntime, wrong: float) -> None:
        self._runtime, self._wrong, self.close = runtime, np.float32(wrong), runtime.close

    def run(self, images):
        return {name: values + self._wrong for name, values in self._runtime.run(images).items()}


def test_a_correct_runtime_passes_the_self_test(serve_with, onnx_runtime, bundle) -> None:
    reply = serve_with(onnx_runtime).get("/selftest")
    found = reply.json()
    assert (reply.status_code, found["num_images"], found["version"]) == (200, 3, bundle.manifest.id)
    assert found["deviation"]["logits"] <= found["tolerance"]["logits"]
    assert reply.headers["x-model-digest"] == bundle.manifest.id


def test_the_model_of_a_self_test_must_be_known(client) -> None:
    unknown = client.get("/selftest?model=nothing")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")


def test_changing_the_model_must_be_enabled(client) -> None:
    reply = client.post("/v1/models/tiny/rollback")
    assert (reply.status_code, reply.json()["code"]) == (403, "model_control_off")


@pytest.mark.parametrize(("wrong", "code"), [(0.01, "selftest_failed"), (np.nan, "nonfinite_output")])
def test_a_drifting_runtime_fails_the_self_test(serve_with, onnx_runtime, wrong, code) -> None:
    reply = serve_with(Drifting(onnx_runtime, wrong)).get("/selftest")
    assert (reply.status_code, reply.json()["code"]) == (500, code)


def test_rollback_activates_the_previous_version(
    tmp_path: Path, make_bundle: Callable[..., Path], run_server, onnx_runtime, jpeg
) -> None:
    first, second = make_bundle(tmp_path, probes=3), make_bundle(tmp_path, probes=4)
    settings = Settings(threads=1, model_control=True)
    with run_server(
        onnx_runtime, open_bundle(first), settings, shelf=BundleStore([f"tiny={first}"])
    ) as client:
        assert client.post("/v1/models/tiny/rollback").json()["code"] == "no_previous_version"
        load = {"parameters": {"folder": second.name}}
        assert client.post("/v2/repository/models/tiny/load", json=load).status_code == 200
        assert client.get("/info").json()["previous"] == {"tiny": open_bundle(first).manifest.id}
        assert version_of(client, jpeg) == open_bundle(second).manifest.id
        assert client.post("/v1/models/tiny/rollback").json()["bundle"] == first.name
        assert version_of(client, jpeg) == open_bundle(first).manifest.id


def version_of(client, body: bytes) -> str:
    reply = client.post("/v1/classify", content=body)
    assert reply.status_code == 200
    return reply.headers["x-model-digest"]
