"""A request that was answered is gone at once.

What waits for the garbage collector may keep an image in memory, and every collection stops all threads.
"""

import gc
import json
import socket
from collections import Counter

import pytest

from tests.service.raw import GET, connect, read

TIMES = 30


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
    "a picture": post,
    "a picture with an answer in another order": lambda jpeg: post(jpeg, query=b"?top_k=3"),
    "a form": form,
    "JSON": lambda _: post(json.dumps({"image": "AAAA"}).encode(), kind=b"application/json"),
    "a tensor": tensor,
    "no picture": lambda _: post(b"text"),
    "an unknown model": lambda jpeg: post(jpeg, query=b"?model=x"),
    "an unknown parameter": lambda jpeg: post(jpeg, query=b"?top_k=0"),
    "a probe of health": lambda _: GET + b"\r\n",
    "no page": lambda _: b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
}


def once(client, request: bytes, wire: socket.socket | None) -> None:
    if wire is not None:
        wire.sendall(request)
        read(wire, to_the_end=False)
        return
    with connect(client) as own:
        own.sendall(request.replace(b"Host: x", b"Host: x\r\nConnection: close", 1))
        read(own)


@pytest.mark.parametrize("kept", [True, False], ids=["on one connection", "each on its own"])
@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_an_answered_request_leaves_nothing_to_the_garbage_collector(client, jpeg, request_of, kept):
    request = request_of(jpeg)
    with connect(client) as wire:
        for _ in range(3):
            once(client, request, wire if kept else None)
        gc.collect()
        gc.disable()
        try:
            for _ in range(TIMES):
                once(client, request, wire if kept else None)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = Counter(type(one).__name__ for one in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert sum(left.values()) < TIMES, left
