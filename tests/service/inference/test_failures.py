"""Full queues, missed deadlines, runtimes that fail or hang, JSON that waits, and answers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from sopdeploy.bundle.decision import softmax
from sopdeploy_commands.app import app
from sopdeploy_service.api import admission
from sopdeploy_service.api.v2 import routes
from sopdeploy_service.inference import model_registry, model_worker, request_queue, service
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import count
from tests.support.runtimes import Failing, Held
from tests.support.service import wait_for


def post(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/v1/classify", content=body)


def test_a_full_queue_is_429_and_every_image_of_a_form_counts(serve_with, pool, jpeg):
    runtime = Held()
    files = [("image", jpeg)] * 2
    client = serve_with(runtime, queue_size=3, max_images=3)
    assert (count(client, 'limit{of="images"}'), count(client, "ready")) == (3, 1)

    replies = [pool.submit(post, client, jpeg) for _ in range(2)]
    wait_for(lambda: count(client, "queue_depth") == 2)
    rejected = [client.post("/v1/classify", files=files)]
    replies.append(pool.submit(post, client, jpeg))
    wait_for(lambda: count(client, "queue_depth") == 3)
    rejected.append(post(client, jpeg))

    for reply in rejected:
        assert (reply.status_code, reply.json()["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60

    assert client.get("/readyz").status_code == 200

    runtime.gate.set()
    assert [reply.result().status_code for reply in replies] == [200] * 3
    assert client.post("/v1/classify", files=files).status_code == 200
    assert 'rejected_total{reason="queue_full"} 2.0' in client.get("/metrics").text


# admitted images of each process, this one first; front ends, engines; is another one in time?
SHARES = {
    "few images": ((2,), 0, 1, True),
    "many images": ((20,), 0, 1, False),
    "many images of another device": ((2, 20), 0, 1, True),
    "many images of this device": ((20, 2), 0, 1, False),
    "two front ends of an engine": ((10, 10), 2, 1, False),
    "two front ends of four engines": ((10, 10), 2, 4, True),
}


@pytest.mark.parametrize(
    ("admitted", "front_ends", "engines", "is_in_time"), SHARES.values(), ids=SHARES
)
def test_only_images_on_the_same_device_delay_an_image(
    bundle, monkeypatch, admitted, front_ends, engines, is_in_time
):
    monkeypatch.setattr(model_worker.LocalModel, "num_devices", engines)
    runtime = FakeRuntime(num_classes=7, largest_batch=1)
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={}, timings=((1, 1.0),))
    registry = model_registry.ModelRegistry({"tiny": loaded}, Settings())
    served = service.Service(registry, Settings())
    served._is_started = True
    served.num_front_ends = front_ends
    cells = memoryview(bytearray(8 * len(admitted))).cast("q")
    served.share_admitted(cells, 0)
    served.admitted = admitted[0]
    for position, count_of_process in enumerate(admitted[1:], 1):
        cells[position] = count_of_process
    is_refused = False

    try:
        served.check_admission(registry.find(), time.monotonic() + 10)
    except RejectedError as error:
        is_refused = error.reason.code == "deadline_unreachable"

    assert is_refused == (not is_in_time)


def test_an_image_that_misses_its_deadline_is_504_and_never_runs(serve_with, pool, jpeg):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    # The first image is in a batch at its deadline, the others are not.
    late = [{"X-Request-Timeout-Ms": str(milliseconds)} for milliseconds in (1000, 300, 300)]
    replies = [pool.submit(client.post, "/v1/classify", content=jpeg, headers=late[0])]
    wait_for(runtime.entered.is_set)
    replies += [
        pool.submit(client.post, "/v1/classify", content=jpeg, headers=headers)
        for headers in late[1:]
    ]
    answers = [reply.result() for reply in replies]

    assert [answer.status_code for answer in answers] == [504] * 3
    assert {answer.json()["code"] for answer in answers} == {"deadline"}
    assert count(client, "queue_depth") == 0
    runtime.gate.set()

    assert post(client, jpeg).status_code == 200
    assert runtime.batches == [1, 1]


def test_a_dead_or_hung_runtime_rejects_everything_and_fails_the_health_checks(
    serve_with, pool, jpeg, monkeypatch
):
    monkeypatch.setattr(model_worker, "MIN_HANG_SECONDS", 0.4)
    hung = Held(largest_batch=1)
    for runtime in (Failing({1: SystemExit("the device is gone")}), hung):
        client = serve_with(runtime)
        replies = pool.map(lambda _, client=client: post(client, jpeg), range(3))
        assert [reply.json()["code"] for reply in replies] == ["runtime_dead"] * 3
        assert [client.get(path).status_code for path in ("/readyz", "/livez")] == [503, 503]

    hung.gate.set()


def test_an_internal_error_is_a_problem_response(serve_with, jpeg, monkeypatch):
    client = serve_with(FakeRuntime(num_classes=7))
    monkeypatch.setattr("sopdeploy.bundle.decision.Decision.answer", lambda *_: 1 / 0)
    reply = post(client, jpeg)

    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert len(reply.headers["x-request-id"]) == 32

    monkeypatch.undo()
    assert post(client, jpeg).status_code == 200
    assert 'requests_total{code="500"' in client.get("/metrics").text


class Broken(FakeRuntime):
    """Fails with an unknown error while `broken` is true; a blank image fails too if `everywhere` is."""

    broken = True
    everywhere = True

    def run(self, images):
        if self.broken and (self.everywhere or images.any()):
            raise RuntimeError(
                "CUBLAS_STATUS_EXECUTION_FAILED in a library that does not name CUDA's error"
            )
        return super().run(images)


def test_a_device_that_fails_every_batch_ends_the_server(serve_with, jpeg):
    client = serve_with(Broken(num_classes=7))
    assert post(client, jpeg).json()["code"] == "inference_failed"

    wait_for(lambda: client.app.state.service.state == "runtime_dead")
    runtime = Broken(num_classes=7)
    runtime.everywhere = False
    client = serve_with(runtime)

    assert [post(client, jpeg).json()["code"] for _ in range(2)] == ["inference_failed"] * 2

    runtime.broken = False
    assert post(client, jpeg).status_code == 200
    assert runtime.batches == [1, 1, 1]  # two blank images, then the image


@pytest.mark.parametrize(
    ("device", "cores", "expected"), [("cpu", 16, 2), ("cuda:0", 6, 6), ("cuda:0", 32, 8)]
)
def test_a_process_with_a_gpu_has_a_decoder_per_core(
    bundle, monkeypatch, device, cores, expected
):
    monkeypatch.setattr("sopdeploy_service.settings.usable_cores", lambda: cores)
    loaded = LoadedModel(
        bundle=bundle, runtime=FakeRuntime(num_classes=7, device=device), replays={}
    )
    registry = model_registry.ModelRegistry({"tiny": loaded}, Settings())

    assert service.Service(registry, Settings())._choose_num_decoders() == expected


@pytest.fixture
def blocked(monkeypatch):
    """One parser, which waits until the event is set; `.at_work` is how often it began."""
    gate = threading.Event()
    gate.at_work = 0

    def waiting(whole):
        def read(*given):
            gate.at_work += 1
            gate.wait(60)
            return whole(*given)

        return read

    monkeypatch.setattr(service, "PARSERS", 1)
    monkeypatch.setattr(admission, "parse_upload", waiting(admission.parse_upload))
    monkeypatch.setattr(routes, "parse_body", waiting(routes.parse_body))
    yield gate
    gate.set()


TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
REQUESTS = {"/v1/classify": {"image": "AAAA"}, "/v2/models/tiny/infer": {"inputs": [TENSOR]}}


@pytest.mark.parametrize("path", REQUESTS)
def test_requests_that_wait_for_a_parser_have_a_deadline(serve_with, blocked, path):
    client = serve_with(FakeRuntime(num_classes=7), queue_size=4, max_images=1)

    # One request, whose parser is blocked until its deadline.
    reply = client.post(path, json=REQUESTS[path], headers={"X-Request-Timeout-Ms": "200"})
    assert (reply.status_code, count(client, "queue_depth")) == (504, 0)

    # Four wait and fill the queue, so the fifth is refused.
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(client.post, path, json=REQUESTS[path]) for _ in range(4)]
        wait_for(lambda: count(client, "queue_depth") == 4)
        late = client.post(path, json=REQUESTS[path])
        assert blocked.at_work == 1
        blocked.set()
        statuses = {one.result().status_code for one in sent}
    assert late.status_code == 429
    assert late.headers.get("x-error-code", "queue_full") == "queue_full"

    # The four are parsed: the content of "AAAA" is not an image, the tensor is one.
    assert statuses == {415 if path == "/v1/classify" else 200}
    wait_for(lambda: count(client, "queue_depth") == 0)


def test_a_batch_out_of_memory_is_halved_until_one_image_fails(serve_with, jpeg, monkeypatch):
    take = request_queue.RequestQueue.take

    def take_all(queue, max_size, *, only_full=False):
        """Take the eight images at once, whenever each of them is decoded."""
        wait_for(lambda: len(queue._images) == 8 or queue.closed_with is not None)
        return take(queue, max_size, only_full=only_full)

    monkeypatch.setattr(request_queue.RequestQueue, "take", take_all)
    runtime = Failing({1: "oom", 2: "oom", 3: "oom", 4: "oom"})
    client = serve_with(runtime, max_batch=8)
    results = client.post("/v1/classify", files=[("image", jpeg)] * 8).json()["results"]
    (failed,) = (result["error"] for result in results if "error" in result)
    assert (failed["code"], failed["status"]) == ("out_of_memory", 503)
    assert runtime.batches == [1, 2, 4]


# Images of a batch, and the seconds after which it counts as hung. A warm-up took 0.01 s for one and
# 0.5 s for eight; the time of six is between them, and the limit is never below 4 s.
HANGS = {8: 20 * 0.5, 6: 20 * 0.36, 1: 4.0}


def test_a_batch_counts_as_hung_after_twenty_times_its_usual_time(bundle):
    runtime = FakeRuntime(num_classes=7)
    timings = ((1, 0.01), (8, 9.0), (8, 0.5))
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={}, timings=timings)
    served = model_worker.LocalModel("tiny", loaded, Settings(), Metrics())

    for num_images, seconds in HANGS.items():
        assert served.hang_seconds(num_images) == pytest.approx(seconds)


FIRST_BATCHES = {
    "serve": OutOfMemoryError("Failed to allocate memory for a buffer of size 9"),
    "verify": DeviceLostError("CUDA 719, cudaErrorLaunchFailure: unspecified launch failure"),
    "predict": RuntimeError("CUDNN failure 8: CUDNN_STATUS_EXECUTION_FAILED\nfile=cudnn.cc"),
}


@pytest.mark.parametrize("command", FIRST_BATCHES)
def test_a_first_batch_that_fails_ends_every_command_in_one_line(
    bundle_path, jpeg, tmp_path, monkeypatch, command
):
    error = FIRST_BATCHES[command]
    runtime = Failing(dict.fromkeys(range(99), error))
    monkeypatch.setattr("sopdeploy_service.inference.loader.open_runtime", lambda *_: runtime)
    (tmp_path / "image.jpg").write_bytes(jpeg)
    more = {"serve": ["--port", "0"], "predict": [str(tmp_path / "image.jpg")]}.get(command, [])
    result = CliRunner().invoke(app, [command, str(bundle_path), *more])

    assert result.exit_code == 2
    reason = " ".join(str(error).split())
    assert result.stderr.splitlines() == [
        f"error: fake cannot run a batch on fake: {type(error).__name__}: {reason} [no_runtime]"
    ]


def test_softmax_of_any_logits_is_the_distribution_of_its_definition():
    for logits in ([3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e-45, 0.0, -1e-45], [1, 2, 3]):
        values = np.array(logits, np.float32)
        exponentials = np.exp(values.astype(np.float64) - values.max())

        np.testing.assert_allclose(
            softmax(values), exponentials / exponentials.sum(), rtol=1e-12
        )
