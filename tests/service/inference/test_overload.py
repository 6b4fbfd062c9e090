"""Servers with a fake runtime: full queue, missed deadline, failing and hung runtime, JSON that waits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fake_runtime import FakeRuntime

from sopdeploy_service.api import admission
from sopdeploy_service.api.v2 import routes
from sopdeploy_service.inference import service
from sopdeploy_service.settings import Settings
from tests.service.raw import count
from tests.service.runtimes import Held


class FailingRuntime(FakeRuntime):
    """Raises *problem* for a batch with a dark image."""

    def __init__(self, problem: BaseException) -> None:
        super().__init__(num_classes=7, fixed_ms=30, largest_batch=16)
        self.problem = problem

    def run(self, images):
        if (images.mean(axis=(1, 2, 3)) < 10).any():
            raise self.problem
        return super().run(images)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(24) as pool:
        yield pool


def post(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/v1/classify", content=body)


def test_images_queued_during_a_batch_share_the_next_one(serve_with, pool, jpeg, until):
    runtime = Held(largest_batch=8)
    client = serve_with(runtime)
    replies = [pool.submit(post, client, jpeg)]
    assert runtime.entered.wait(60)
    replies += [pool.submit(post, client, jpeg) for _ in range(10)]
    decoded = 'stage_duration_seconds_count{stage="decode"} 11.0'
    until(lambda: decoded in client.get("/metrics").text)
    runtime.gate.set()
    assert [reply.result().status_code for reply in replies] == [200] * 11
    assert runtime.batches == [1, 8, 2]


def test_a_full_queue_is_429_with_a_retry_time_and_every_image_of_a_form_counts(
    serve_with, pool, jpeg, until
):
    runtime, files = Held(), [("image", jpeg)] * 2
    client = serve_with(runtime, queue_size=3, max_images=3)
    replies = [pool.submit(post, client, jpeg) for _ in range(2)]
    until(lambda: count(client, "queue_depth") == 2)
    rejected = [client.post("/v1/classify", files=files)]
    replies.append(pool.submit(post, client, jpeg))
    until(lambda: count(client, "queue_depth") == 3)
    rejected.append(post(client, jpeg))
    for reply in rejected:
        assert (reply.status_code, reply.json()["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert client.get("/readyz").status_code == 200
    runtime.gate.set()
    assert [reply.result().status_code for reply in replies] == [200] * 3
    assert client.post("/v1/classify", files=files).status_code == 200
    assert 'rejected_total{reason="queue_full"} 2.0' in client.get("/metrics").text


def test_an_image_that_misses_its_deadline_is_504_and_never_runs(serve_with, pool, jpeg):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    late = {"X-Request-Timeout-Ms": "300"}
    replies = [pool.submit(client.post, "/v1/classify", content=jpeg, headers=late) for _ in range(4)]
    answers = [reply.result() for reply in replies]
    assert [answer.status_code for answer in answers] == [504] * 4
    assert answers[0].json()["code"] == "deadline"
    assert count(client, "queue_depth") == 0
    runtime.gate.set()
    assert post(client, jpeg).status_code == 200
    assert runtime.batches == [1, 1]


def test_a_dead_worker_rejects_everything_and_fails_the_health_checks(serve_with, jpeg, make_picture, until):
    client = serve_with(FailingRuntime(SystemExit("the device is gone")))
    assert post(client, jpeg).status_code == 200
    reply = post(client, make_picture((2, 2, 2), kind="PNG"))
    assert (reply.status_code, reply.json()["code"]) == (503, "runtime_dead")
    for path in ("/readyz", "/livez"):
        assert client.get(path).status_code == 503
    assert post(client, jpeg).json()["code"] == "runtime_dead"


def test_a_hung_runtime_is_detected_and_queued_images_are_rejected(serve_with, pool, jpeg):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime, batch_timeout_seconds=0.4)
    replies = pool.map(lambda _: post(client, jpeg), range(3))
    assert [reply.json()["code"] for reply in replies] == ["runtime_dead"] * 3
    assert client.get("/readyz").json() == {"status": "runtime_dead"}
    runtime.gate.set()


def test_an_internal_error_is_a_problem_response(serve_with, jpeg, monkeypatch):
    client = serve_with(FakeRuntime(num_classes=7))
    monkeypatch.setattr("sopdeploy.decision.Answer.fields", lambda *_: 1 / 0)
    reply = post(client, jpeg)
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert len(reply.headers["x-request-id"]) == 32
    monkeypatch.undo()
    assert post(client, jpeg).status_code == 200
    assert 'requests_total{code="500"' in client.get("/metrics").text


def test_a_stopped_server_leaves_no_threads(run_server, bundle, jpeg, until):
    def names() -> set[str]:
        return {thread.name.partition("_")[0] for thread in threading.enumerate()}

    with run_server(FakeRuntime(num_classes=7), bundle, Settings()) as client:
        assert post(client, jpeg).status_code == 200
        assert {"model", "decoder"} <= names()
    until(lambda: not {"model", "decoder"} & names())


class Broken(FakeRuntime):
    """Fails with an unknown error while `broken` is true; a blank image fails too if `everywhere` is."""

    broken, everywhere = True, True

    def run(self, images):
        if self.broken and (self.everywhere or images.any()):
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED in a library that does not name CUDA's error")
        return super().run(images)


def test_a_device_that_fails_every_batch_ends_the_server_whatever_its_error_is(serve_with, jpeg, until):
    client = serve_with(Broken(num_classes=7))
    assert post(client, jpeg).json()["code"] == "inference_failed"
    until(lambda: client.app.state.service.state == "runtime_dead")


def test_images_that_fail_in_a_row_do_not_stop_a_working_device(serve_with, jpeg):
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
def test_a_process_with_a_gpu_has_a_decoder_per_core(serve_with, monkeypatch, device, cores, expected):
    monkeypatch.setattr(service, "cores_within_quota", lambda: cores)
    client = serve_with(FakeRuntime(num_classes=7, device=device))
    assert f"sopdeploy_decoders {expected}.0" in client.get("/metrics").text


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
def test_requests_waiting_for_a_parser_count_in_the_queue(serve_with, blocked, until, path):
    client = serve_with(FakeRuntime(num_classes=7), queue_size=4, max_images=1)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(client.post, path, json=REQUESTS[path]) for _ in range(4)]
        until(lambda: count(client, "queue_depth") == 4)
        late = client.post(path, json=REQUESTS[path])
        assert blocked.at_work == 1
        blocked.set()
        statuses = {one.result().status_code for one in sent}
    assert late.status_code == 429
    assert late.headers.get("x-error-code", "queue_full") == "queue_full"
    assert statuses == {415 if path == "/v1/classify" else 200}
    until(lambda: count(client, "queue_depth") == 0)


@pytest.mark.usefixtures("blocked")
def test_a_request_without_a_free_parser_ends_at_the_deadline(serve_with):
    client = serve_with(FakeRuntime(num_classes=7))
    for path, body in REQUESTS.items():
        reply = client.post(path, json=body, headers={"X-Request-Timeout-Ms": "200"})
        assert (reply.status_code, count(client, "queue_depth")) == (504, 0)
