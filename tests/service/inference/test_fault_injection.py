"""Injected faults have the effects of real failures."""

from types import SimpleNamespace

import numpy as np
import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.inference import fault_injection, model
from sopdeploy_service.inference.fault_injection import NO_FAULTS, InjectedError, parse_faults
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import OutOfMemoryError
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


def test_every_documented_fault_is_parsed():
    found = parse_faults(
        "engine=hang@5, engine=nan@3,engine=raise@2,engine=slow*10,engine=oom@4,decoder=die@2,decoder=die@9,"
    )
    assert found.engine == {5: "hang", 3: "nan", 2: "raise", 4: "oom"}
    assert (found.decoder, found.slow) == ({2, 9}, 10)
    assert parse_faults("") == NO_FAULTS


NO_FAULT_TEXTS = [
    "engine",
    "engine=hang",
    "engine=hang@0",
    "engine=hang@-1",
    "engine=slow@3",
    "decoder=nan@1",
]


@pytest.mark.parametrize("text", [*NO_FAULT_TEXTS, "x=y@1", "engine=nan@1;engine=nan@2", "engine=nan@\u0661"])
def test_any_other_text_is_an_error(text):
    with pytest.raises(ConfigError, match=r"^SOPDEPLOY_FAULTS: .* is not a fault; use one of: engine=hang@5"):
        parse_faults(text)


def test_without_faults_nothing_is_wrapped():
    runtime = FakeRuntime(classes=3)
    assert NO_FAULTS.wrap_runtime(runtime) is runtime
    assert NO_FAULTS.wrap_decoder(len) is len
    assert parse_faults("decoder=die@1").wrap_runtime(runtime) is runtime


def test_each_fault_affects_only_its_run():
    runtime = parse_faults("engine=nan@1,engine=raise@2,engine=oom@3").wrap_runtime(FakeRuntime(classes=3))
    assert np.isnan(runtime.run(IMAGES)["logits"]).all(axis=1).tolist() == [True, False]
    with pytest.raises(InjectedError, match="engine=raise@2"):
        runtime.run(IMAGES)
    with pytest.raises(OutOfMemoryError):
        runtime.run(IMAGES)
    assert np.isfinite(runtime.run(IMAGES)["logits"]).all()
    assert (runtime.name, runtime.device) == ("fake", "fake")


def test_a_slow_model_takes_a_multiple_of_its_time(monkeypatch):
    times, slept = iter([10.0, 10.5]), []
    monkeypatch.setattr(
        fault_injection, "time", SimpleNamespace(monotonic=lambda: next(times), sleep=slept.append)
    )
    parse_faults("engine=slow*5").wrap_runtime(FakeRuntime(classes=3)).run(IMAGES)
    assert slept == [2.0]  # 4 * 0.5 more


@pytest.fixture
def serve(run_server, bundle):
    """`serve(faults)` runs a server with *faults*."""
    return lambda faults, runtime=None, **settings: run_server(
        runtime or FakeRuntime(classes=7, largest_batch=8),
        bundle,
        Settings(**settings),
        faults=parse_faults(faults),
    )


@pytest.mark.parametrize(
    ("faults", "status", "code"),
    [
        ("engine=nan@2", 500, "nonfinite_output"),
        ("engine=raise@2", 500, "engine_failed"),
        ("engine=oom@2", 503, "out_of_memory"),
        ("decoder=die@2", 500, "decoder_failed"),
    ],
)
def test_a_fault_affects_only_its_image(serve, jpeg, faults, status, code):
    with serve(faults) as client:
        responses = [client.post("/v1/classify", content=jpeg) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, status, 200, 200]
    assert responses[1].json()["code"] == code


@pytest.mark.parametrize("faults", ["decoder=die@2", "engine=nan@1"])
def test_other_images_of_a_form_keep_their_predictions(serve, jpeg, faults):
    with serve(faults) as client:
        results = client.post("/v1/classify", files=[("image", jpeg)] * 5).json()["results"]
    assert sum("classes" in result for result in results) == 4
    assert sum("error" in result for result in results) == 1


def test_out_of_memory_halves_batches_for_a_while(serve, jpeg):
    runtime = FakeRuntime(classes=7, fixed_ms=5, largest_batch=8)

    def eight() -> list[int]:
        del runtime.batches[:]
        reply = client.post("/v1/classify", files=[("image", jpeg)] * 8)
        assert all("classes" in result for result in reply.json()["results"])
        return runtime.batches[:]

    delay = 3_000  # longer than decoding
    with serve("engine=oom@1", runtime, max_batch=8, max_queue_delay_ms=delay) as client:
        assert eight() == [4, 4]
        assert eight() == [4, 4]
        client.app.state.service.registry.find()._worker._limited_until = 0.0  # the time is over
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
