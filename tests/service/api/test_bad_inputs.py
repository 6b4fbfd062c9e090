"""Invalid images, forms, paths and methods: each has its own status and error code."""

import gzip
import io
import struct
import threading
import time
import zlib
from contextlib import ExitStack
from functools import partial

import httpx
import numpy as np
import pytest
from PIL import Image

from sopdeploy_service.runtime.fake import FakeRuntime
from tests.service.raw import connect, read


def png(width: int, height: int, depth: int = 1, extra: bytes = b"") -> bytes:
    """A gray PNG of any size with little pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data)) + chunk(
        b"IEND", b""
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def jpeg_of_size(width: int, height: int, jpeg: bytes) -> bytes:
    """Change the size in the frame header of *jpeg*."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 60)).save(file, kind, **options)
    return file.getvalue()


EMPTY_SCAN = b"\xff\xda\0\x08\1\1\0\1\x3f\x10"
ZTXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))

BAD_BODIES = {
    "empty body": (lambda jpeg: b"", 400, "empty_body"),
    "JPEG cut in half": (lambda jpeg: jpeg[: len(jpeg) // 2], 422, "truncated_image"),
    "20 bytes of JPEG": (lambda jpeg: jpeg[:20], 422, None),
    "3 bytes of JPEG": (lambda jpeg: jpeg[:3], 422, None),
    "text": (lambda jpeg: b"hello, I am a cat", 415, "not_an_image"),
    "HTML": (lambda jpeg: b"<!doctype html><html></html>", 415, "not_an_image"),
    "JSON": (lambda jpeg: b'{"image": "aGVsbG8="}', 415, "not_an_image"),
    "random bytes": (lambda jpeg: np.random.default_rng(5).bytes(5000), 415, "not_an_image"),
    "PNG of 900 megapixels": (lambda jpeg: png(30_000, 30_000), 413, "too_many_pixels"),
    "PNG of 169 megapixels": (lambda jpeg: png(13_000, 13_000), 413, "too_many_pixels"),
    "PNG of 100 megapixels": (lambda jpeg: png(10_000, 10_000), 413, "too_many_pixels"),
    "PNG of 51 megapixels": (lambda jpeg: png(51_000, 1000), 413, "too_many_pixels"),
    "JPEG of 4290 megapixels": (lambda jpeg: jpeg_of_size(65_500, 65_500, jpeg), 413, "too_many_pixels"),
    "PNG without a width": (lambda jpeg: png(0, 10), 422, None),
    "PNG without its pixels": (lambda jpeg: png(500, 500, 8), 422, None),
    "PNG with a text bomb": (lambda jpeg: png(8, 8, extra=ZTXT_BOMB), 422, None),
    "PNG with 20000 broken chunks": (
        lambda jpeg: png(8, 8, extra=b"\0\0\0\0tEXt\0\0\0\0" * 20_000),
        422,
        None,
    ),
    "PNG with 20000 chunks": (
        lambda jpeg: png(8, 8, extra=chunk(b"prVt", b"") * 20_000),
        422,
        "damaged_image",
    ),
    "JPEG with 20000 empty segments": (
        lambda jpeg: jpeg[:2] + b"\xff\xfe\0\2" * 20_000 + jpeg[2:],
        422,
        "damaged_image",
    ),
    "JPEG with 20000 bytes of filling": (
        lambda jpeg: jpeg[:2] + b"\xff" * 20_000 + jpeg[2:],
        422,
        "damaged_image",
    ),
    "GIF with 20000 empty extensions": (
        lambda jpeg: saved("GIF").replace(b",\0\0\0\0", b"!\xfe\x01a\0" * 20_000 + b",\0\0\0\0", 1),
        422,
        "damaged_image",
    ),
    "progressive JPEG with 1000 scans": (
        lambda jpeg: saved("JPEG", progressive=True)[:-2] + EMPTY_SCAN * 1000 + b"\xff\xd9",
        422,
        "damaged_image",
    ),
    "progressive JPEG with 1000 scans behind a stray byte": (
        lambda jpeg: (
            saved("JPEG", progressive=True)[:20]
            + b"\0"
            + saved("JPEG", progressive=True)[20:-2]
            + EMPTY_SCAN * 1000
            + b"\xff\xd9"
        ),
        422,
        "damaged_image",
    ),
    "TIFF": (lambda jpeg: saved("TIFF"), 415, "unsupported_format"),
    "ICO": (lambda jpeg: saved("ICO"), 415, "unsupported_format"),
    "PDF": (lambda jpeg: b"%PDF-1.7 ...", 415, "unsupported_format"),
    "EPS": (lambda jpeg: saved("EPS"), 415, "unsupported_format"),
    "SVG": (lambda jpeg: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "unsupported_format"),
    "arithmetic-coded JPEG": (
        lambda jpeg: jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1),
        415,
        "unsupported_format",
    ),
    "JPEG without a width": (lambda jpeg: jpeg_of_size(0, 10, jpeg), 422, "damaged_image"),
    "JPEG without a height": (lambda jpeg: jpeg_of_size(10, 0, jpeg), 422, "damaged_image"),
    "GIF without a width": (lambda jpeg: b"GIF89a" + bytes(100), 422, None),
    "BMP without a width": (lambda jpeg: saved("BMP")[:18] + bytes(4) + saved("BMP")[22:], 422, None),
    "PNG with a broken checksum": (lambda jpeg: saved("PNG")[:29] + b"oops" + saved("PNG")[33:], 422, None),
    "XML": (lambda jpeg: b"<?xml version='1.0'?><svg/>", 415, "unsupported_format"),
    "AVIF": (lambda jpeg: b"\0\0\0\x1cftypavif" + bytes(100), 415, "unsupported_format"),
    "JPEG 2000": (lambda jpeg: saved("JPEG2000"), 415, "unsupported_format"),
    "a sound": (lambda jpeg: b"RIFF\0\0\0\0WAVEfmt " + bytes(100), 415, "not_an_image"),
    "zip": (lambda jpeg: b"PK\3\4" + bytes(100), 415, "not_an_image"),
    "gzip": (lambda jpeg: gzip.compress(jpeg), 415, "not_an_image"),
    "HEIC": (lambda jpeg: b"\0\0\0\x18ftypheic" + bytes(100), 415, "unsupported_format"),
    "PSD": (lambda jpeg: b"8BPS\0\1" + bytes(100), 415, "unsupported_format"),
    "one byte over the limit": (lambda jpeg: jpeg + bytes(1_000_001 - len(jpeg)), 413, "too_large"),
    "far over the limit": (lambda jpeg: bytes(30_000_000), 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_rejected_and_the_next_request_succeeds(client, jpeg, name):
    make, status, code = BAD_BODIES[name]
    body = make(jpeg)
    started = time.monotonic()
    reply = client.post("/v1/classify", content=body)
    assert time.monotonic() - started < 10  # long before the deadline
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert code is None or reply.json()["code"] == code
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def gradient(mode: str) -> Image.Image:
    return Image.linear_gradient("L").resize((60, 40)).convert("RGB").convert(mode)


def stored(mode: str, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    gradient(mode).save(file, kind, **options)
    return file.getvalue()


def strip(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def deep_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "blue")] * 3}

UNUSUAL = {
    "1 x 1": lambda: strip(1, 1),
    "1 x 20000": lambda: strip(1, 20_000),
    "20000 x 1": lambda: strip(20_000, 1),
    "16 bits": deep_png,
    **{f"PNG of mode {mode}": partial(stored, mode) for mode in ["1", "L", "LA", "P", "RGBA"]},
    "palette with transparency": lambda: stored("P", transparency=3),
    "CMYK": lambda: stored("CMYK", "JPEG"),
    "YCbCr": lambda: stored("YCbCr", "JPEG"),
    "progressive": lambda: stored("RGB", "JPEG", progressive=True),
    "4:4:4": lambda: stored("RGB", "JPEG", subsampling=0),
    "corrupt EXIF": lambda: stored("RGB", "JPEG", exif=b"Exif\0\0garbage"),
    "EXIF that points nowhere": lambda: stored(
        "RGB", "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\xff\xff\xff\xff"
    ),
    "corrupt ICC": lambda: stored("RGB", "JPEG", icc_profile=b"garbage" * 20),
    "corrupt ICC in a PNG": lambda: stored("RGB", icc_profile=b"garbage" * 20),
    "animated GIF": lambda: stored("RGB", "GIF", **FRAMES),
    "animated PNG": lambda: stored("RGB", "PNG", **FRAMES),
    "animated WebP": lambda: stored("RGB", "WEBP", **FRAMES),
    "WebP": lambda: stored("RGB", "WEBP"),
    "BMP": lambda: stored("RGB", "BMP"),
    "trailing bytes": lambda: stored("RGB", "JPEG") + bytes(1000),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_valid_image_is_classified(client, name):
    reply = client.post("/v1/classify", content=UNUSUAL[name]())
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("kind", ["text/plain", "image/png", "application/json", "x", "", "image/svg+xml"])
def test_the_format_is_detected_from_the_bytes(client, jpeg, kind):
    reply = client.post("/v1/classify", content=jpeg, headers={"Content-Type": kind})
    assert reply.status_code == 200


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PDF", "EPS", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "DDS"])
def test_an_unsupported_format_never_reaches_pillow(client, kind, monkeypatch):
    body = saved(kind)
    opened = []
    monkeypatch.setattr(Image, "open", lambda *given, **options: opened.append(given))
    assert client.post("/v1/classify", content=body).status_code == 415
    assert opened == []


def test_the_error_for_heic_mentions_the_camera_setting(client):
    reply = client.post("/v1/classify", content=b"\0\0\0\x18ftypheic" + bytes(100))
    assert "camera" in reply.json()["detail"]


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=XX"}
PART = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

BAD_REQUESTS = {
    "form without boundary": ({"Content-Type": "multipart/form-data"}, b"x", 400, "malformed_multipart"),
    "form with a huge boundary": (
        {"Content-Type": "multipart/form-data; boundary=" + "X" * 1000},
        b"x",
        400,
        "malformed_multipart",
    ),
    "invalid form": (BOUNDARY, b"hello", 400, "malformed_multipart"),
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
    "form with 9 images of 8": (BOUNDARY, (PART + b"x\r\n") * 9 + b"--XX--\r\n", 400, "too_many_images"),
    "form with 1001 images": (BOUNDARY, (PART + b"x\r\n") * 1001 + b"--XX--\r\n", 400, "too_many_images"),
    "another multipart": (
        {"Content-Type": "multipart/mixed; boundary=XX"},
        b"--XX--",
        415,
        "unsupported_multipart",
    ),
    "gzip": ({"Content-Encoding": "gzip"}, b"\x1f\x8b", 415, "unsupported_encoding"),
    "two encodings": ({"Content-Encoding": "identity, br"}, b"x", 415, "unsupported_encoding"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_rejected_and_the_next_request_succeeds(client, jpeg, name):
    headers, body, status, code = BAD_REQUESTS[name]
    reply = client.post("/v1/classify", content=body, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_large_body_without_a_length_is_rejected_while_it_arrives(client, jpeg):
    reply = client.post("/v1/classify", content=iter([bytes(65_536)] * 400))
    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert reply.headers["connection"] == "close"
    assert client.post("/v1/classify", content=jpeg).status_code == 200


BAD_PATHS = [
    ("GET", "/v1/classify", 405, "method_not_allowed"),
    ("PUT", "/v1/classify", 405, "method_not_allowed"),
    ("DELETE", "/v1/classify", 405, "method_not_allowed"),
    ("OPTIONS", "/v1/classify", 405, "method_not_allowed"),
    ("TRACE", "/v1/classify", 405, "method_not_allowed"),
    ("POST", "/livez", 405, "method_not_allowed"),
    ("POST", "/v1/classify/", 404, "not_found"),
    ("POST", "/v1//classify", 404, "not_found"),
    ("POST", "//v1/classify", 404, "not_found"),
    ("POST", "/v1/./classify", 404, "not_found"),
    ("POST", "/v1/x/../classify", 404, "not_found"),
    ("POST", "/V1/classify", 404, "not_found"),
    ("POST", "/v1/classify%00", 404, "not_found"),
    ("POST", "/v1/..%2fclassify", 404, "not_found"),
    ("POST", "/v2/models/..%2f..%2fetc%2fpasswd/infer", 404, None),
    ("GET", "/..%2f..%2f..%2fetc/passwd", 404, "not_found"),
    ("GET", "/%ff%fe", 404, "not_found"),
    ("GET", "/livez/", 404, "not_found"),
    ("GET", "/wp-login.php", 404, "not_found"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), BAD_PATHS)
def test_a_bad_method_or_path_is_rejected_and_never_redirected(client, method, path, status, code):
    with connect(client) as wire:
        wire.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        reply = read(wire, to_the_end=False)
    assert reply.status == status
    assert "location" not in reply.headers
    assert code is None or reply.code == code


def test_512_concurrent_images_get_200_or_429(serve_with, jpeg):
    client = serve_with(FakeRuntime(classes=7), queue_size=64, max_connections=600)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
    with ExitStack() as stack:
        wires = [stack.enter_context(connect(client)) for _ in range(512)]
        for wire in wires:
            wire.sendall(head + jpeg)
        statuses = [read(wire, to_the_end=False).status for wire in wires]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 64
    assert client.post("/v1/classify", content=jpeg).status_code == 200


NEIGHBORS = {
    "text": (lambda jpeg: b"I am no image", 415),
    "JPEG cut in half": (lambda jpeg: jpeg[: len(jpeg) // 2], 422),
    "pixel bomb": (lambda jpeg: png(30_000, 30_000), 413),
    "text bomb": (lambda jpeg: png(8, 8, extra=ZTXT_BOMB), 422),
}


@pytest.mark.parametrize("bad", NEIGHBORS)
def test_a_bad_image_does_not_affect_concurrent_images(serve_with, jpeg, bad):
    make, status = NEIGHBORS[bad]
    client = serve_with(FakeRuntime(classes=7, fixed_ms=10))
    bodies = [jpeg] * 7 + [make(jpeg)]
    rounds = [post_concurrently(client, bodies) for _ in range(10)]
    assert rounds == [[200] * 7 + [status]] * 10


def post_concurrently(client: httpx.Client, bodies: list[bytes]) -> list[int]:
    statuses = [0] * len(bodies)

    def post(place: int) -> None:
        statuses[place] = client.post("/v1/classify", content=bodies[place]).status_code

    threads = [threading.Thread(target=post, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return statuses
