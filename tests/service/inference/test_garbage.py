"""A finished request leaves nothing to the garbage collector.

Garbage may keep an image in memory, and every collection stops all threads.
"""

import gc
import json
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.service.raw import GET, connect, read

TIMES = 30


@pytest.fixture(scope="module", autouse=True)
def _without_what_other_tests_left() -> None:
    """Exclude the objects of other tests from the many collections here."""
    gc.collect()
    gc.freeze()


def post(body: bytes, *more: bytes, kind: bytes = b"image/jpeg", query: bytes = b"") -> bytes:
    head = [b"POST /v1/classify" + query + b" HTTP/1.1", b"Host: x", b"Content-Type: " + kind]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), *more, b"", body])


def form(jpeg: bytes) -> bytes:
    field = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n%s\r\n' % jpeg
    return post(field * 2 + b"--x--\r\n", kind=b"multipart/form-data; boundary=x")


def tensor(_: bytes) -> bytes:
    values = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    body = json.dumps({"inputs": [values]}).encode()
    return b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


REQUESTS = {
    "an image": post,
    "an image with top_k": lambda jpeg: post(jpeg, query=b"?top_k=3"),
    "a form": form,
    "JSON": lambda _: post(json.dumps({"image": "AAAA"}).encode(), kind=b"application/json"),
    "a tensor": tensor,
    "text": lambda _: post(b"text"),
    "an unknown model": lambda jpeg: post(jpeg, query=b"?model=x"),
    "an unknown parameter": lambda jpeg: post(jpeg, query=b"?top_k=0"),
    "a health probe": lambda _: GET + b"\r\n",
    "an unknown path": lambda _: b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("keep_alive", [True, False], ids=["on one connection", "one connection each"])
@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_a_finished_request_leaves_no_garbage(client, jpeg, request_of, keep_alive):
    request = request_of(jpeg)
    if not keep_alive:
        request = request.replace(b"Host: x", b"Host: x\r\nConnection: close", 1)

    def send(times: int) -> None:
        with ExitStack() as stack:
            for number in range(times):
                if number == 0 or not keep_alive:
                    wire = stack.enter_context(connect(client))
                wire.sendall(request)
                read(wire, to_the_end=not keep_alive)

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
