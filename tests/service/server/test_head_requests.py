"""`HEAD` responses equal `GET` responses without the body."""

import pytest

from tests.service.raw import connect

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


def test_a_rejected_head_request_has_no_body(client):
    long = b"Host: localhost\r\nA: " + b"b" * 40_000 + b"\r\n"
    for lines, status in ((b"", b"400"), (long, b"431")):
        with connect(client) as wire:
            wire.sendall(b"HEAD /livez HTTP/1.1\r\n" + lines + b"\r\n")
            data = b"".join(iter(lambda wire=wire: wire.recv(65_536), b""))
        assert data.startswith(b"HTTP/1.1 " + status)
        assert data.endswith(b"\r\n\r\n")
        assert data.count(b"\r\n\r\n") == 1
