"""`HEAD` responses equal `GET` responses without the body."""

import pytest

from tests.service.raw import connect, count

MODEL = "/v2/models/tiny"
READ = [
    *("/", "/docs", "/errors", "/openapi.json", "/livez", "/readyz", "/info", "/v1/card"),
    *("/v2", "/v2/health/live", "/v2/health/ready"),
    *(MODEL, f"{MODEL}/ready"),
    *("/v1/card?model=other", "/v2/models/other", "/nothing"),
]


@pytest.mark.parametrize("path", READ)
def test_head_has_the_status_and_headers_of_get_and_no_body(client, path):
    get, head = client.get(path), client.head(path)
    assert get.content
    assert (head.status_code, head.content) == (get.status_code, b"")
    for reply in (get, head):
        for name in ("x-request-id", "date"):  # differ in every response
            reply.headers.pop(name, None)
    assert head.headers == get.headers
    assert int(head.headers["content-length"]) == len(get.content)


def test_metrics_support_head_and_count_it(client):
    before = count(client, 'requests_total{code="200",model="",route="/info"}')
    assert client.head("/info").status_code == 200
    assert count(client, 'requests_total{code="200",model="",route="/info"}') == before + 1
    head = client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 1000


def test_post_endpoints_reject_head(client):
    for path in ("/v1/classify", "/v1/classify?top_k=%31", f"{MODEL}/infer"):
        head = client.head(path)
        assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")


def test_no_body_precedes_the_next_response(client):
    with connect(client) as wire:
        for _ in range(3):  # the connection must stay usable
            wire.sendall(
                b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            data = b""
            while not data.endswith(b'{"status":"ok"}'):
                data += wire.recv(65_536)
            first, _, rest = data.partition(b"\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 200 ")
            assert rest.startswith(b"HTTP/1.1 200 ")


def test_a_rejected_head_request_has_no_body(client):
    long = b"Host: localhost\r\nA: " + b"b" * 40_000 + b"\r\n"
    for lines, status in ((b"", b"400"), (long, b"431")):
        with connect(client) as wire:
            wire.sendall(b"HEAD /livez HTTP/1.1\r\n" + lines + b"\r\n")
            data = b"".join(iter(lambda wire=wire: wire.recv(65_536), b""))
        assert data.startswith(b"HTTP/1.1 " + status)
        assert data.endswith(b"\r\n\r\n")
        assert data.count(b"\r\n\r\n") == 1


def test_openapi_has_no_head(client):
    operations = client.get("/openapi.json").json()["paths"].values()
    assert not any("head" in methods for methods in operations)
