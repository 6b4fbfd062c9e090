"""Runtimes and decoders that fail, finished requests without garbage, and answers."""

import gc
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
import pytest
from fake_runtime import FakeRuntime
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.decision import Decision, Rejection, softmax, top_indices
from sopdeploy.http_api import Classes
from sopdeploy_service.inference import model_worker
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError
from sopdeploy_service.settings import Settings
from tests.service.raw import connect, count, read
from tests.service.runtimes import Failing, Held


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
        served = model_worker.Model("tiny", loaded, Settings(batch_timeout_seconds=timeout), Metrics())
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


TIMES = 30


@pytest.fixture(scope="module", autouse=True)
def _without_what_other_tests_left() -> None:
    """Exclude the objects of other tests from the many collections here."""
    gc.collect()
    gc.freeze()


def post(body: bytes, kind: bytes = b"image/jpeg", query: bytes = b"") -> bytes:
    head = [b"POST /v1/classify" + query + b" HTTP/1.1", b"Host: x", b"Content-Type: " + kind]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


def form(jpeg: bytes) -> bytes:
    field = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n%s\r\n' % jpeg
    return post(field * 2 + b"--x--\r\n", kind=b"multipart/form-data; boundary=x")


def tensor(_: bytes) -> bytes:
    values = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    body = json.dumps({"inputs": [values]}).encode()
    return (
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
    )


REQUESTS = {
    "an image": post,
    "a form": form,
    "JSON": lambda _: post(json.dumps({"image": "AAAA"}).encode(), kind=b"application/json"),
    "a tensor": tensor,
    "an unknown model": lambda jpeg: post(jpeg, query=b"?model=x"),
}


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_a_finished_request_leaves_no_garbage(client, jpeg, request_of):
    request = request_of(jpeg)

    def send(times: int) -> None:
        with connect(client) as wire:
            for _ in range(times):
                wire.sendall(request)
                read(wire, to_the_end=False)

    send(3)
    gc.collect()
    gc.disable()
    try:
        send(TIMES)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(one).__name__ for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert sum(left.values()) < TIMES, left


SMALL = arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3).map(float))


@given(SMALL, st.integers(1, 50))
def test_top_indices_equals_a_stable_sort(values, count):
    assert top_indices(values, count) == np.argsort(-values, kind="stable")[:count].tolist()


@given(SMALL, st.integers(1, 50), st.none() | st.just(Rejection(score="energy", threshold=2.0)))
def test_the_fields_of_an_answer_are_a_valid_response_model(logits, top_k, rejection):
    labels = [f"class {index}" for index in range(len(logits))]
    found = Decision(rejection=rejection).answer(logits, top_k).fields(labels)
    model = Classes.model_validate(found, strict=False)
    assert orjson.dumps(found) == orjson.dumps(model.model_dump(exclude_none=True, exclude={"warnings"}))


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
def test_classes_are_sorted_and_ties_keep_the_label_order(logits, top_k, labels):
    found = Decision().answer(np.array(logits, np.float32), top_k).fields(["a", "b", "c"])
    assert [entry["label"] for entry in found["classes"]] == labels


@pytest.mark.parametrize(
    "logits", [[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e-45, 0.0, -1e-45], [1, 2, 3]]
)
def test_softmax_of_any_logits_is_the_distribution_of_its_definition(logits):
    values = np.array(logits, np.float32)
    found = softmax(values)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)
    exponentials = np.exp(values.astype(np.float64) - values.max())
    np.testing.assert_allclose(found, exponentials / exponentials.sum(), rtol=1e-12)


def test_requests_in_one_batch_get_as_many_classes_as_they_want(serve_with, jpeg, until):
    runtime = Held()
    client = serve_with(runtime)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.post, "/v1/classify", content=jpeg)]
        assert runtime.entered.wait(60)
        paths = [f"/v1/classify?top_k={top_k}" for top_k in (1, 99, 3)]
        futures += [pool.submit(client.post, path, content=jpeg) for path in paths]
        until(lambda: count(client, "queue_depth") == 4)
        until(lambda: count(client, 'stage_duration_seconds_count{stage="decode"}') == 4)
        runtime.gate.set()
        classes = [future.result(60).json()["classes"] for future in futures]
    assert runtime.batches == [1, 3]
    assert [len(listed) for listed in classes] == [5, 1, 7, 3]
    assert all(listed == classes[2][: len(listed)] for listed in classes)
