"""JSON that waits for a parser and URLs being fetched are counted, bounded and held to the deadline."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sopdeploy_service.api import upload
from sopdeploy_service.api.v2 import routes
from sopdeploy_service.runtime.fake import FakeRuntime

PIXELS = np.zeros((1, 32, 32, 3), np.uint8)


def depth(client):
    lines = client.get("/metrics").text.splitlines()
    (line,) = (one for one in lines if one.startswith("sopdeploy_queue_depth "))
    return float(line.split()[1])


@pytest.fixture
def blocked(monkeypatch):
    """Parsers that wait until the event is set; `.at_work` is how many do."""
    gate = threading.Event()
    gate.at_work = 0

    def waiting(whole):
        def read(*given):
            gate.at_work += 1
            gate.wait(20)
            return whole(*given)

        return read

    monkeypatch.setattr(upload, "parse_upload", waiting(upload.parse_upload))
    monkeypatch.setattr(routes, "parse_body", waiting(routes.parse_body))
    yield gate
    gate.set()


def v1(client, **options):
    return client.post("/v1/classify", json={"image": "AAAA"}, **options)


def v2(client, **options):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": PIXELS.ravel().tolist()}
    return client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}, **options)


@pytest.mark.parametrize("ask", [v1, v2])
def test_requests_waiting_for_a_parser_count_in_the_queue(serve_with, blocked, until, ask):
    client = serve_with(FakeRuntime(classes=7), queue_size=4, max_images=1, parsers=1)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(ask, client) for _ in range(4)]
        until(lambda: depth(client) == 4)
        late = ask(client)
        assert blocked.at_work == 1
        blocked.set()
        statuses = {one.result().status_code for one in sent}
    assert late.status_code == 429
    assert late.headers.get("x-error-code", "queue_full") == "queue_full"
    assert statuses == {415 if ask is v1 else 200}
    until(lambda: depth(client) == 0)


@pytest.mark.parametrize("ask", [v1, v2])
def test_a_request_without_a_free_parser_ends_at_the_deadline(serve_with, blocked, ask):
    client = serve_with(FakeRuntime(classes=7), parsers=1)
    reply = ask(client, headers={"X-Request-Timeout-Ms": "300"})
    assert reply.status_code == 504
    assert depth(client) == 0


def test_concurrent_url_fetches_are_limited(serve_with, monkeypatch, until, jpeg):
    under_way = []

    async def slow_fetch(url, settings):
        under_way.append(url)
        while "open" not in under_way:
            await asyncio.sleep(0.01)
        return jpeg

    monkeypatch.setattr(upload, "fetch", slow_fetch)
    client = serve_with(FakeRuntime(classes=7), url_fetches=2)
    body = {"url": "https://img.example/a.jpg"}
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(client.post, "/v1/classify", json=body) for _ in range(2)]
        until(lambda: len(under_way) == 2)
        assert depth(client) == 2
        late = client.post("/v1/classify", json=body)
        under_way.append("open")
        assert [one.result().status_code for one in sent] == [200, 200]
    assert (late.status_code, late.json()["code"]) == (429, "fetches_full")
    assert late.headers["retry-after"] == "1"
    assert client.post("/v1/classify", json=body).status_code == 200
