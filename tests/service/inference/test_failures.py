"""Runtimes and decoders that fail: only their images are affected."""

import pytest
from fake_runtime import FakeRuntime
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy_service.inference import model
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError
from sopdeploy_service.settings import Settings
from tests.service.failing import Failing


def test_a_run_out_of_memory_fails_only_its_image(serve_with, jpeg):
    client = serve_with(Failing({2: "oom"}))
    responses = [client.post("/v1/classify", content=jpeg) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 503, 200]
    assert responses[1].json()["code"] == "out_of_memory"


def test_out_of_memory_halves_batches_for_a_while(serve_with, jpeg, monkeypatch):
    runtime = Failing({1: "oom", 6: "oom"}, fixed_ms=5)

    def eight() -> list[int]:
        del runtime.batches[:]
        reply = client.post("/v1/classify", files=[("image", jpeg)] * 8)
        assert all("classes" in result for result in reply.json()["results"])
        return runtime.batches[:]

    client = serve_with(runtime, max_batch=8, max_queue_delay_ms=5000)
    assert eight() == [4, 4]
    assert eight() == [4, 4]
    monkeypatch.setattr("sopdeploy_service.inference.model_worker.SMALLER_SECONDS", 0)
    assert eight() == [2, 2, 4]
    assert eight() == [8]


def test_a_batch_counts_as_hung_after_twenty_times_its_usual_time(bundle):
    runtime = FakeRuntime(num_classes=7)
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={}, timings=((1, 0.01), (8, 9.0), (8, 0.5)))
    for timeout, images, seconds in ((None, 8, 10.0), (None, 3, 10.0), (None, 1, 4.0), (2.5, 3, 2.5)):
        served = model.Model("tiny", loaded, Settings(batch_timeout_seconds=timeout), Metrics())
        assert served.hang_seconds(images) == seconds


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["verify"], ["predict"]])
@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("Failed to allocate memory for a buffer of size 9"),
        DeviceLostError("CUDA 719, cudaErrorLaunchFailure: unspecified launch failure"),
        RuntimeError("CUDNN failure 8: CUDNN_STATUS_EXECUTION_FAILED\nfile=cudnn.cc"),
    ],
)
def test_a_first_batch_that_fails_ends_every_command_in_one_line(
    bundle_path, jpeg, tmp_path, monkeypatch, command, error
):
    runtime = Failing(dict.fromkeys(range(99), error))
    monkeypatch.setattr("sopdeploy_service.inference.loader.open_runtime", lambda *_: runtime)
    (tmp_path / "image.jpg").write_bytes(jpeg)
    name, *options = command
    images = [str(tmp_path / "image.jpg")] if name == "predict" else []
    result = CliRunner().invoke(app, [name, str(bundle_path), *images, *options])
    assert result.exit_code == 2
    reason = " ".join(str(error).split())
    assert result.stderr.splitlines() == [
        f"error: fake cannot run a batch on fake: {type(error).__name__}: {reason} [no_runtime]"
    ]
