"""A finished request leaves nothing to the garbage collector.

Garbage may keep an image in memory, and every collection stops all threads.
"""

import gc
import json
from collections import Counter

import pytest

from tests.service.raw import connect, read

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
