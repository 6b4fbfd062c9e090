"""Images as base64 in JSON: every spelling of base64 is understood, everything else is refused."""

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy_service.api.upload import JsonBody, read_json
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.strict_json import decode_text

BYTES = bytes(range(256)) + b"\xfb\xff"
TEXT = base64.b64encode(BYTES).decode()

SPELLINGS = {
    "plain": TEXT,
    "a data URI": f"data:image/jpeg;base64,{TEXT}",
    "a data URI in capitals": f"DATA:image/png;charset=x;BASE64,{TEXT}",
    "a data URI without a type": f"data:;base64,{TEXT}",
    "lines of 76": base64.encodebytes(BYTES).decode(),
    "Windows lines": base64.encodebytes(BYTES).decode().replace("\n", "\r\n"),
    "URL-safe": base64.urlsafe_b64encode(BYTES).decode(),
    "without padding": TEXT.rstrip("="),
    "URL-safe without padding": base64.urlsafe_b64encode(BYTES).decode().rstrip("="),
    "spaces around": f" {TEXT}\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_base64_is_understood(spelling):
    assert decode_text(SPELLINGS[spelling], "image") == BYTES


@given(st.binary(max_size=50), st.booleans())
def test_base64_gives_back_its_bytes(raw, padded):
    text = base64.b64encode(raw).decode()
    assert decode_text(text if padded else text.rstrip("="), "image") == raw


BAD_TEXTS = [
    "!",
    "abc$",
    "a",
    "YQ==YQ==",
    "YQ===",
    "=",
    "é",
    "data:image/png,abc",
    "data:image/png;base64",
    "YR=\0=",
    "Y",
    5,
    None,
    [],
    True,
]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=repr)
def test_what_is_not_base64_is_refused_with_its_place(text):
    with pytest.raises(RejectedError) as caught:
        decode_text(text, "images[3]")
    refusal = caught.value.refusal
    assert refusal.status == 400
    assert refusal.code == ("bad_base64" if isinstance(text, str) else "malformed_request")
    assert refusal.message.startswith("images[3]: ")


def read(value: Any) -> JsonBody:
    raw = value if isinstance(value, bytes) else orjson.dumps(value)
    return read_json(raw, 10_000, 3)


def test_one_image_several_and_an_address_are_told_apart():
    assert read({"image": "YQ=="}) == JsonBody([b"a"], None, several=False, top_k=None)
    assert read({"images": ["YQ=="], "top_k": 2}) == JsonBody([b"a"], None, several=True, top_k=2)
    assert read({"url": "https://a.example/b"}) == JsonBody(
        [], "https://a.example/b", several=False, top_k=None
    )
    assert read({"image": "", "top_k": 2**60}).top_k == 1_000_000


BAD_BODIES = {
    "no object": (["YQ=="], 400, "malformed_request"),
    "a text": ("YQ==", 400, "malformed_request"),
    "nothing": ({}, 400, "malformed_request"),
    "no image": ({"top_k": 1}, 400, "malformed_request"),
    "two sources": ({"image": "YQ==", "url": "https://a"}, 400, "malformed_request"),
    "an unknown key": ({"image": "YQ==", "topk": 1}, 400, "malformed_request"),
    "an empty list": ({"images": []}, 422, "no_image"),
    "too many": ({"images": ["YQ=="] * 4}, 400, "too_many_images"),
    "images no list": ({"images": "YQ=="}, 400, "malformed_request"),
    "an image in a list in a list": ({"images": [["YQ=="]]}, 400, "malformed_request"),
    "bad base64": ({"image": "$"}, 400, "bad_base64"),
    "bad base64 among good": ({"images": ["YQ==", "$"]}, 400, "bad_base64"),
    "a number for the URL": ({"url": 5}, 400, "malformed_request"),
    "top_k zero": ({"image": "YQ==", "top_k": 0}, 400, "malformed_request"),
    "top_k a float": ({"image": "YQ==", "top_k": 1.0}, 400, "malformed_request"),
    "top_k true": ({"image": "YQ==", "top_k": True}, 400, "malformed_request"),
    "top_k a text": ({"image": "YQ==", "top_k": "5"}, 400, "malformed_request"),
    "broken": (b'{"image": "YQ==', 400, "malformed_json"),
    "empty": (b"", 400, "malformed_json"),
    "deep": (b"[" * 9000, 400, "malformed_json"),
    "a key twice": (b'{"image": "YQ==", "image": "Yg=="}', 400, "duplicate_key"),
    "too large": (orjson.dumps({"image": "A" * 10_000}), 413, "json_too_large"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_body_that_is_not_one_is_refused(case):
    value, status, code = BAD_BODIES[case]
    with pytest.raises(RejectedError) as caught:
        read(value)
    assert (caught.value.refusal.status, caught.value.refusal.code) == (status, code)
