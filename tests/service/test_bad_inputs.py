"""Every bad request gets its own refusal, and the good request after it an answer."""

import http.client
import io
import socket
import struct
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image


def png(width: int, height: int, depth: int = 1, extra: bytes = b"") -> bytes:
    """The header of a grey PNG of any size, with hardly any pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data)) + chunk(
        b"IEND", b""
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def jpeg_that_says(width: int, height: int, jpeg: bytes) -> bytes:
    """*jpeg* with another size in its frame header."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 60)).save(file, kind, **options)
    return file.getvalue()


ZTXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))

BAD_BODIES = {
    "empty body": (lambda jpeg: b"", 400, "empty_body"),
    "JPEG cut in half": (lambda jpeg: jpeg[: len(jpeg) // 2], 422, "truncated_image"),
    "20 bytes of JPEG": (lambda jpeg: jpeg[:20], 422, None),
    "3 bytes of JPEG": (lambda jpeg: jpeg[:3], 422, None),
    "text": (lambda jpeg: b"hello, I am a cat", 415, "not_an_image"),
    "HTML": (lambda jpeg: b"<!doctype html><html></html>", 415, "not_an_image"),
    "JSON": (lambda jpeg: b'{"image": "aGVsbG8="}', 415, "not_an_image"),
    "random bytes": (
        lambda jpeg: np.random.default_rng(5).bytes(5000),
        415,
        "not_an_image",
    ),
    "PNG of 900 megapixels": (lambda jpeg: png(30_000, 30_000), 413, "too_many_pixels"),
    "PNG of 169 megapixels": (lambda jpeg: png(13_000, 13_000), 413, "too_many_pixels"),
    "PNG of 100 megapixels": (lambda jpeg: png(10_000, 10_000), 413, "too_many_pixels"),
    "PNG of 51 megapixels": (lambda jpeg: png(51_000, 1000), 413, "too_many_pixels"),
    "JPEG of 4290 megapixels": (
        lambda jpeg: jpeg_that_says(65_500, 65_500, jpeg),
        413,
        "too_many_pixels",
    ),
    "PNG without a width": (lambda jpeg: png(0, 10), 422, None),
    "PNG without its pixels": (lambda jpeg: png(500, 500, 8), 422, None),
    "PNG with a text bomb": (lambda jpeg: png(8, 8, extra=ZTXT_BOMB), 422, None),
    "PNG with 20000 broken chunks": (
        lambda jpeg: png(8, 8, extra=b"\0\0\0\0tEXt\0\0\0\0" * 20_000),
        422,
        None,
    ),
    "TIFF": (lambda jpeg: saved("TIFF"), 415, "unsupported_format"),
    "ICO": (lambda jpeg: saved("ICO"), 415, "unsupported_format"),
    "PDF": (lambda jpeg: b"%PDF-1.7 ...", 415, "unsupported_format"),
    "EPS": (lambda jpeg: saved("EPS"), 415, "unsupported_format"),
    "SVG": (lambda jpeg: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "unsupported_format"),
    "HEIC": (lambda jpeg: b"\0\0\0\x18ftypheic" + bytes(100), 415, "unsupported_format"),
    "PSD": (lambda jpeg: b"8BPS\0\1" + bytes(100), 415, "unsupported_format"),
    "one byte over the limit": (lambda jpeg: jpeg + bytes(1_000_001 - len(jpeg)), 413, "too_large"),
    "far over the limit": (lambda jpeg: bytes(30_000_000), 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_gets_its_own_refusal_and_the_next_request_an_answer(client, jpeg, name):
    make, status, code = BAD_BODIES[name]
    body = make(jpeg)
    started = time.monotonic()
    reply = client.post("/v1/classify", content=body)
    assert time.monotonic() - started < 4
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert code is None or reply.json()["code"] == code
    assert client.post("/v1/classify", content=jpeg).status_code == 200


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=XX"}
PART = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

BAD_REQUESTS = {
    "form without boundary": (
        {"Content-Type": "multipart/form-data"},
        b"x",
        400,
        "malformed_multipart",
    ),
    "form with a huge boundary": (
        {"Content-Type": "multipart/form-data; boundary=" + "X" * 1000},
        b"x",
        400,
        "malformed_multipart",
    ),
    "form that is none": (BOUNDARY, b"hello", 400, "malformed_multipart"),
    "empty form body": (BOUNDARY, b"", 400, "malformed_multipart"),
    "form without a part": (BOUNDARY, b"--XX--\r\n", 422, "no_image"),
    "form cut in a part": (BOUNDARY, PART + b"\xff\xd8\xff", 400, "malformed_multipart"),
    "form cut after a part": (BOUNDARY, PART + b"x\r\n--XX", 400, "malformed_multipart"),
    "form with another field": (
        BOUNDARY,
        PART.replace(b'"image"', b'"upload"') + b"x\r\n--XX--\r\n",
        422,
        "unexpected_field",
    ),
    "form part without a name": (
        BOUNDARY,
        b"--XX\r\nContent-Type: image/png\r\n\r\nx\r\n--XX--\r\n",
        422,
        "unexpected_field",
    ),
    "form with an empty image": (BOUNDARY, PART + b"\r\n--XX--\r\n", 400, "empty_body"),
    "form with 9 images of 8": (
        BOUNDARY,
        (PART + b"x\r\n") * 9 + b"--XX--\r\n",
        400,
        "too_many_images",
    ),
    "form with 1001 images": (
        BOUNDARY,
        (PART + b"x\r\n") * 1001 + b"--XX--\r\n",
        400,
        "too_many_images",
    ),
    "another multipart": (
        {"Content-Type": "multipart/mixed; boundary=XX"},
        b"--XX--",
        415,
        "unsupported_multipart",
    ),
    "gzip": ({"Content-Encoding": "gzip"}, b"\x1f\x8b", 415, "unsupported_encoding"),
    "two encodings": (
        {"Content-Encoding": "identity, br"},
        b"x",
        415,
        "unsupported_encoding",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_its_own_refusal_and_the_next_one_an_answer(client, jpeg, name):
    headers, body, status, code = BAD_REQUESTS[name]
    reply = client.post("/v1/classify", content=body, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_body_over_the_limit_without_a_length_is_refused_while_it_comes(client, jpeg):
    reply = client.post("/v1/classify", content=iter([bytes(65_536)] * 400))
    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert reply.headers["connection"] == "close"
    assert client.post("/v1/classify", content=jpeg).status_code == 200


@pytest.mark.parametrize("length", [2_000_000, 10**12, 10**30])
def test_a_length_over_the_limit_is_refused_before_the_body_comes(client, length):
    with connection(client) as wire:
        wire.sendall(head(f"Content-Length: {length}"))
        reply = http.client.HTTPResponse(wire)
        reply.begin()
        assert reply.status in {400, 413}
        assert reply.getheader("connection") == "close"


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: -1",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: five",
    ],
)
def test_a_length_that_makes_no_sense_is_refused(client, jpeg, headers):
    with connection(client) as wire:
        wire.sendall(head(headers) + b"hello")
        assert wire.recv(12) == b"HTTP/1.1 400"
    assert client.post("/v1/classify", content=jpeg).status_code == 200


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 100]
)
def test_other_protocols_on_the_port_do_no_harm(client, jpeg, noise):
    with connection(client) as wire:
        wire.sendall(noise)
        wire.shutdown(socket.SHUT_WR)
        wire.recv(1000)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(client, jpeg):
    for _ in range(5):
        with connection(client) as wire:
            wire.sendall(head("Content-Length: 1000") + jpeg[:100])
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def connection(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def head(headers: str) -> bytes:
    return f"POST /v1/classify HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode()


@pytest.mark.parametrize("bad", ["text", "cut JPEG"])
def test_a_bad_image_does_no_harm_to_the_seven_good_ones_beside_it(client, jpeg, bad):
    bodies = [jpeg] * 7 + [b"I am no image" if bad == "text" else jpeg[: len(jpeg) // 2]]
    for _ in range(10):
        statuses = post_together(client, bodies)
        assert statuses[:7] == [200] * 7
        assert statuses[7] in {415, 422}


def post_together(client: httpx.Client, bodies: list[bytes]) -> list[int]:
    statuses = [0] * len(bodies)

    def post(place: int) -> None:
        statuses[place] = client.post("/v1/classify", content=bodies[place]).status_code

    threads = [threading.Thread(target=post, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return statuses
