"""What goes out and what comes back: the same for both clients."""

import io

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.client import Client
from sopdeploy.client.images import encoded
from sopdeploy.client.results import timing
from sopdeploy.errors import ConfigError, DataError, ServiceError, UnreachableError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_everything_that_an_answer_says_is_in_the_result(call, script):
    body = {
        "classes": [{"label": "cat", "probability": 0.75, "later": 1}],
        "gates": [{"expert": 3, "weight": 0.5}],
        "warnings": ["exif_rotated"],
        "key_of_a_newer_server": {},
    }
    headers = {"X-Model-Digest": "3f6c01d2a4b7", "Server-Timing": "decode;dur=3.10, infer;dur=5"}
    found = call(script(httpx.Response(200, json=body, headers=headers)), "classify", b"x")
    assert (found.classes[0].label, found.classes[0].probability) == ("cat", 0.75)
    assert [(gate.expert, gate.weight) for gate in found.gates] == [(3, 0.5)]
    assert (found.warnings, found.error) == (("exif_rotated",), None)
    assert (found.model_digest, found.timing_ms) == ("3f6c01d2a4b7", {"decode": 3.1, "infer": 5.0})


def test_one_image_goes_as_the_body_and_says_what_is_wanted(call, script, answer):
    server = script(answer)
    call(server, "classify", b"bytes", top_k=3, model="a b", gates=True, api_key="secret")
    sent = server.requests[0]
    assert (sent.method, sent.url.path, sent.content) == ("POST", "/v1/classify", b"bytes")
    assert dict(sent.url.params) == {"top_k": "3", "model": "a b", "gates": "true"}
    assert sent.headers["Authorization"] == "Bearer secret"
    assert sent.headers["Content-Type"] == "application/octet-stream"


def test_a_list_goes_as_a_form_and_comes_back_in_order_with_its_errors(call, script):
    refused = {"title": "x", "status": 422, "code": "truncated_image", "detail": "cut"}
    results = {"results": [{"classes": []}, {"error": refused}]}
    server = script(httpx.Response(200, json=results))
    good, bad = call(server, "classify", [b"first", b"second"])
    assert (good.error, bad.error.code, bad.classes) == (None, "truncated_image", ())
    body = server.requests[0].content
    assert 0 < body.index(b"first") < body.index(b"second")
    assert body.count(b'; name="image"') == 2


def test_a_list_of_one_is_answered_with_a_list(call, script, answer):
    assert len(call(script(answer), "classify", (b"x",))) == 1


def test_an_empty_list_asks_nothing(call, script, answer):
    server = script(answer)
    assert (call(server, "classify", []), server.requests) == ([], [])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        b'{"classes": 3}',
        b'{"results": 1}',
        b'{"results": [1]}',
        b"\xff",
    ],
)
def test_an_answer_of_another_server_is_one_clear_line(call, script, content):
    with pytest.raises(ServiceError, match="not as sopdeploy does") as caught:
        call(script(httpx.Response(200, content=content)), "classify", b"x")
    assert caught.value.code == "foreign_answer"


def test_fewer_results_than_images_are_an_error(call, script, answer):
    with pytest.raises(ServiceError, match="1 results for 2 images"):
        call(script(answer), "classify", [b"x", b"y"])


@pytest.mark.parametrize("content", [b"<html>Bad Gateway</html>", b"", b'{"detail": "no"}'])
def test_an_error_page_of_a_proxy_is_an_error_too(call, script, content):
    with pytest.raises(ServiceError, match="502") as caught:
        call(script(httpx.Response(502, content=content)), "classify", b"x")
    assert (caught.value.status, caught.value.code) == (502, "http_error")


def test_info_is_typed(call, script):
    model = {
        "name": "tiny", "id": "3f", "bundle": "tiny-3f", "model": "tiny", "labels": 7, "precision": "fp32",
        "runtime": "onnxruntime", "device": "cpu", "largest_batch": 4, "preprocess": {},
    }  # fmt: skip
    found = call(script(httpx.Response(200, json={"server": "0.1", "models": [model]})), "info")
    assert (found.models[0].name, found.models[0].labels) == ("tiny", 7)


def test_ready_is_waited_for(call, script, refusal, answer, pauses):
    server = script(httpx.ConnectError("no"), refusal(503, "draining"), answer)
    assert call(server, "wait_ready", timeout=5) is None
    assert len(server.requests) == 3


def test_a_server_that_is_never_ready_is_told_with_its_last_words(call, script, refusal):
    with pytest.raises(UnreachableError, match=r"not ready after 0.3 s.*draining"):
        call(script(refusal(503, "draining")), "wait_ready", timeout=0.3)


@pytest.mark.parametrize("url", ["", "server:8000", "ftp://server", "http://", "http://server:port", 3])
def test_a_url_that_is_none_is_refused_at_once(url):
    with pytest.raises(ConfigError, match="URL"):
        Client(url)


@pytest.mark.parametrize("key", ["", "a b", "ü", "a\r\nX: y"])
def test_a_key_that_no_header_carries_is_refused_at_once(key):
    with pytest.raises(ConfigError, match="API key"):
        Client("http://server", api_key=key)


@pytest.mark.parametrize("picture", [PIXELS, PIXELS[..., 0], PIXELS[:, ::2], Image.fromarray(PIXELS)])
def test_pixels_become_png_and_lose_nothing(picture):
    again = np.asarray(Image.open(io.BytesIO(encoded(picture))))
    np.testing.assert_array_equal(again, np.asarray(picture))


def test_files_and_bytes_go_as_they_are(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"any")
    assert encoded(tmp_path / "a.jpg") == encoded(str(tmp_path / "a.jpg")) == encoded(b"any") == b"any"


@pytest.mark.parametrize(
    "picture",
    [3, None, PIXELS.astype(np.float32), PIXELS[None], PIXELS[:0], Image.new("CMYK", (2, 2))],
    ids=["number", "none", "floats", "batch", "empty", "cmyk"],
)
def test_what_is_no_picture_is_refused_before_anything_is_sent(call, script, answer, picture):
    server = script(answer)
    with pytest.raises(ConfigError, match=r"picture|PNG"):
        call(server, "classify", picture)
    assert server.requests == []


def test_a_file_that_is_not_there_is_one_clear_line(call, script, answer, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        call(script(answer), "classify", tmp_path / "none.jpg")


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.text())
def test_any_timing_header_is_read_or_passed_over(text):
    assert all(value >= 0 for value in timing(text).values())
