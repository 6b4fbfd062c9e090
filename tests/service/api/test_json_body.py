"""JSON bodies of `/v1/classify`: base64 spellings, invalid bodies, and responses over HTTP."""

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy_service.api.upload import Upload, parse_upload
from sopdeploy_service.http import fetch
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.strict_json import decode_text
from sopdeploy_service.images.decode import EncodedImage

BYTES = bytes(range(256)) + b"\xfb\xff"
TEXT = base64.b64encode(BYTES).decode()

SPELLINGS = {
    "plain": TEXT,
    "data URI": f"data:image/jpeg;base64,{TEXT}",
    "data URI in capitals": f"DATA:image/png;charset=x;BASE64,{TEXT}",
    "data URI without a type": f"data:;base64,{TEXT}",
    "lines of 76": base64.encodebytes(BYTES).decode(),
    "Windows lines": base64.encodebytes(BYTES).decode().replace("\n", "\r\n"),
    "URL-safe": base64.urlsafe_b64encode(BYTES).decode(),
    "without padding": TEXT.rstrip("="),
    "URL-safe without padding": base64.urlsafe_b64encode(BYTES).decode().rstrip("="),
    "spaces around": f" {TEXT}\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_base64_is_decoded(spelling):
    assert decode_text(SPELLINGS[spelling], "image") == BYTES


@given(st.binary(max_size=50), st.booleans())
def test_base64_round_trip(raw, padded):
    text = base64.b64encode(raw).decode()
    assert decode_text(text if padded else text.rstrip("="), "image") == raw


BAD_TEXTS = ["!", "abc$", "a", "YQ==YQ==", "YQ===", "=", "é", "data:image/png,abc", "data:image/png;base64"]


@pytest.mark.parametrize("text", [*BAD_TEXTS, "YR=\0=", "Y", 5, None, [], True], ids=repr)
def test_invalid_base64_is_rejected_with_its_place(text):
    with pytest.raises(RejectedError) as caught:
        decode_text(text, "images[3]")
    rejection = caught.value.rejection
    assert rejection.status == 400
    assert rejection.code == ("bad_base64" if isinstance(text, str) else "malformed_request")
    assert rejection.message.startswith("images[3]: ")


def parsed(value: Any) -> tuple[Upload, str | None]:
    return parse_upload(value if isinstance(value, bytes) else orjson.dumps(value), 10_000, 3)


def test_a_body_has_one_image_several_images_or_a_url():
    image = EncodedImage(b"a")
    assert parsed({"image": "YQ=="}) == (Upload([image]), None)
    assert parsed({"images": ["YQ=="], "top_k": 2}) == (Upload([image], several=True, top_k=2), None)
    assert parsed({"url": "https://a.example/b"}) == (Upload([]), "https://a.example/b")
    assert parsed({"image": "", "top_k": 2**60})[0].top_k == 1_000_000
    assert parsed({"image": "", "top_k": None})[0].top_k is None


BAD_BODIES = {
    "no object": (["YQ=="], 400, "malformed_request"),
    "text": ("YQ==", 400, "malformed_request"),
    "nothing": ({}, 400, "malformed_request"),
    "no image": ({"top_k": 1}, 400, "malformed_request"),
    "two sources": ({"image": "YQ==", "url": "https://a"}, 400, "malformed_request"),
    "two sources, one null": ({"image": "YQ==", "url": None}, 400, "malformed_request"),
    "null": ({"image": None}, 400, "malformed_request"),
    "unknown key": ({"image": "YQ==", "topk": 1}, 400, "malformed_request"),
    "empty list": ({"images": []}, 422, "no_image"),
    "too many": ({"images": ["YQ=="] * 4}, 400, "too_many_images"),
    "images is no list": ({"images": "YQ=="}, 400, "malformed_request"),
    "nested list": ({"images": [["YQ=="]]}, 400, "malformed_request"),
    "bad base64": ({"image": "$"}, 400, "bad_base64"),
    "bad base64 among good": ({"images": ["YQ==", "$"]}, 400, "bad_base64"),
    "url is a number": ({"url": 5}, 400, "malformed_request"),
    "top_k zero": ({"image": "YQ==", "top_k": 0}, 400, "malformed_request"),
    "top_k float": ({"image": "YQ==", "top_k": 1.0}, 400, "malformed_request"),
    "top_k true": ({"image": "YQ==", "top_k": True}, 400, "malformed_request"),
    "top_k text": ({"image": "YQ==", "top_k": "5"}, 400, "malformed_request"),
    "truncated": (b'{"image": "YQ==', 400, "malformed_json"),
    "empty": (b"", 400, "malformed_json"),
    "deep": (b"[" * 9000, 400, "malformed_json"),
    "duplicate key": (b'{"image": "YQ==", "image": "Yg=="}', 400, "duplicate_key"),
    "too large": (orjson.dumps({"image": "A" * 10_000}), 413, "json_too_large"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_an_invalid_body_is_rejected(case):
    value, status, code = BAD_BODIES[case]
    with pytest.raises(RejectedError) as caught:
        parsed(value)
    assert (caught.value.rejection.status, caught.value.rejection.code) == (status, code)


@pytest.fixture(scope="module")
def text(jpeg) -> str:
    return base64.b64encode(jpeg).decode()


def test_images_in_json_have_the_same_response_as_raw_images(client, jpeg, text):
    plain = client.post("/v1/classify", content=jpeg).json()
    for image in (text, f"data:image/jpeg;base64,{text}", text.replace("+", "-").replace("/", "_")):
        assert client.post("/v1/classify", json={"image": image}).json() == plain
    assert client.post("/v1/classify", json={"images": [text]}).json() == {"results": [plain]}
    two = client.post("/v1/classify", json={"images": [text, "aGVsbG8="]}).json()["results"]
    assert (two[0], two[1]["error"]["code"]) == (plain, "not_an_image")


def test_top_k_in_the_query_overrides_the_body(client, text):
    def classes(path: str, **body: object) -> int:
        return len(client.post(path, json={"image": text, **body}).json()["classes"])

    assert classes("/v1/classify", top_k=2) == 2
    assert classes("/v1/classify?top_k=3", top_k=2) == 3
    assert classes("/v1/classify") == 5


REJECTED = {
    "bad base64": ({"image": "!"}, 400, "bad_base64"),
    "unknown key": ({"picture": ""}, 400, "malformed_request"),
    "empty image": ({"image": ""}, 400, "empty_body"),
    "no image": ({"image": "aGVsbG8="}, 415, "not_an_image"),
    "too many": ({"images": ["aGVsbG8="] * 9}, 400, "too_many_images"),
    "URL": ({"url": "https://img.example/a.jpg"}, 403, "url_input_off"),
    "file": ({"url": "file:///etc/passwd"}, 403, "url_input_off"),
    "too large": ({"image": "A" * 1_000_000}, 413, "too_large"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_an_invalid_body_over_http_does_not_affect_the_next_request(client, text, case):
    body, status, code = REJECTED[case]
    reply = client.post("/v1/classify", json=body)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert client.post("/v1/classify", json={"image": text}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"image": "", "image": ""}', b"\xff"])
def test_malformed_json_over_http_is_400(client, body):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    reply = client.post("/v1/classify", content=body, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["code"] in {"malformed_json", "duplicate_key"}


def test_the_image_of_an_allowed_url_is_classified(serve_with, onnx_runtime, jpeg, monkeypatch):
    async def addresses(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    async def download(target, address, limit, transport) -> bytes:
        assert (target.host, address) == ("img.example", "93.184.216.34")
        return jpeg if target.path == "/a.jpg" else b"<html>"

    monkeypatch.setattr(fetch, "system_addresses", addresses)
    monkeypatch.setattr(fetch, "download", download)
    client = serve_with(onnx_runtime, url_hosts="img.example, other.example")
    plain = client.post("/v1/classify", content=jpeg).json()
    assert client.post("/v1/classify", json={"url": "https://img.example/a.jpg"}).json() == plain
    for url, status, code in (
        ("https://img.example/b", 415, "not_an_image"),
        ("https://169.254.169.254/latest", 403, "url_not_allowed"),
    ):
        reply = client.post("/v1/classify", json={"url": url})
        assert (reply.status_code, reply.json()["code"]) == (status, code)
