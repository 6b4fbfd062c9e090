"""`HEAD` responses equal `GET` responses without the body."""

import pytest

MODEL = "/v2/models/tiny"
READ = [
    *("/", "/docs", "/errors", "/openapi.json", "/livez", "/readyz", "/info", "/v1/card"),
    *("/v2", "/v2/health/live", "/v2/health/ready"),
    *(MODEL, f"{MODEL}/ready"),
    *("/v1/card?model=other", "/v2/models/other", "/nothing"),
]


@pytest.mark.parametrize("path", READ)
def test_head_has_the_status_and_headers_of_get_and_no_body(client, path):
    get = client.get(path)
    head = client.head(path)
    assert get.content
    assert (head.status_code, head.content) == (get.status_code, b"")

    for reply in (get, head):
        for name in ("x-request-id", "date"):  # differ in every response
            reply.headers.pop(name, None)

    assert head.headers == get.headers
    assert int(head.headers["content-length"]) == len(get.content)
