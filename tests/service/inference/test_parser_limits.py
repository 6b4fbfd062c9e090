"""JSON that waits for a parser is counted, bounded and held to the deadline."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_runtime import FakeRuntime

from sopdeploy_service.api import admission
from sopdeploy_service.api.v2 import routes
from sopdeploy_service.inference import service
from tests.service.raw import count


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
