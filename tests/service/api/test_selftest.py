"""`/selftest`."""

import numpy as np
import pytest

from sopdeploy_service.runtime.onnxruntime import OnnxRuntime


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


@pytest.mark.parametrize(("wrong", "code"), [(0.01, "selftest_failed"), (np.nan, "nonfinite_output")])
def test_a_drifting_runtime_fails_the_self_test(serve_with, onnx_runtime, wrong, code) -> None:
    reply = serve_with(Drifting(onnx_runtime, wrong)).get("/selftest")
    assert (reply.status_code, reply.json()["code"]) == (500, code)
