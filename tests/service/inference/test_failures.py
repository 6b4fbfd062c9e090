"""Runtimes and decoders that fail: only their images are affected."""

import itertools
import time

import pytest

from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference import model, service
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings
from tests.service.failing import Failing


@pytest.fixture
def serve(run_server, bundle, monkeypatch):
    """`serve(failure, number)` runs a server whose run or decoded image *number* fails."""

    def start(failure: str, number: int):
        if failure == "decoder":
            numbers = itertools.count(1)

            def make_failing_decoder(settings: Settings):
                decode = make_decoder(settings)
                return lambda *given, **more: decode(*given, **more) if next(numbers) != number else 1 / 0

            monkeypatch.setattr(service, "make_decoder", make_failing_decoder)
        return run_server(Failing({number: failure}), bundle, Settings())

    return start


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("oom", 503, "out_of_memory"),
        ("decoder", 500, "decoder_failed"),
    ],
)
def test_a_failure_affects_only_its_image(serve, jpeg, failure, status, code):
    with serve(failure, 2) as client:
        responses = [client.post("/v1/classify", content=jpeg) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, status, 200, 200]
    assert responses[1].json()["code"] == code


@pytest.mark.parametrize("failure", ["decoder", "nan"])
def test_other_images_of_a_form_keep_their_predictions(serve, jpeg, failure):
    with serve(failure, 1) as client:
        results = client.post("/v1/classify", files=[("image", jpeg)] * 5).json()["results"]
    assert sum("classes" in result for result in results) == 4
    assert sum("error" in result for result in results) == 1


def test_out_of_memory_halves_batches_for_a_while(serve_with, jpeg, monkeypatch):
    monkeypatch.setattr("sopdeploy_service.inference.model_worker.SMALLER_SECONDS", 1.0)
    runtime = Failing({1: "oom"}, fixed_ms=5)

    def eight() -> list[int]:
        del runtime.batches[:]
        reply = client.post("/v1/classify", files=[("image", jpeg)] * 8)
        assert all("classes" in result for result in reply.json()["results"])
        return runtime.batches[:]

    delay = 3_000  # longer than decoding
    client = serve_with(runtime, max_batch=8, max_queue_delay_ms=delay)
    assert eight() == [4, 4]
    assert eight() == [4, 4]
    time.sleep(1.0)
    assert eight() in ([4, 4], [8])  # the worker may have asked for four already
    assert eight() == [8]


@pytest.mark.parametrize(
    ("device", "timeout", "images", "seconds"),
    [
        ("cuda:0", None, 8, 10.0),  # 20 times the measured half second
        ("cuda:0", None, 1, 4.0),
        ("cuda:0", None, 3, 60.0),  # a library may choose kernels for this size
        ("cuda:0", 2.5, 3, 2.5),
        ("cpu", None, 3, 10.0),
    ],
)
def test_the_first_batch_of_a_size_may_take_longer_on_a_gpu(bundle, device, timeout, images, seconds):
    runtime = FakeRuntime(classes=7, device=device)
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={}, timings=((1, 0.01), (8, 9.0), (8, 0.5)))
    served = model.Model("tiny", loaded, Settings(batch_timeout_seconds=timeout), Metrics())
    assert served.hang_seconds(images) == seconds
