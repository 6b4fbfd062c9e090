"""JSON bodies of `/v1/classify`: base64 spellings, invalid bodies, and responses over HTTP."""

import base64
from typing import Any

import orjson
import pytest

from sopdeploy_service.api.admission import Upload, parse_upload
from sopdeploy_service.http.strict_json import decode_text
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import RejectedError

BYTES = bytes(range(256)) + b"\xfb\xff"
TEXT = base64.b64encode(BYTES).decode()

SPELLINGS = {
    "plain": TEXT,
    "data URI": f"data:image/jpeg;base64,{TEXT}",
    "data URI in capitals": f"DATA:image/png;charset=x;BASE64,{TEXT}",
    "lines of 76": base64.encodebytes(BYTES).decode(),
    "URL-safe": base64.urlsafe_b64encode(BYTES).decode(),
    "URL-safe without padding": base64.urlsafe_b64encode(BYTES).decode().rstrip("="),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_base64_is_decoded(spelling):
    assert decode_text(SPELLINGS[spelling], "image") == BYTES


BAD_TEXTS = ["abc$", "a", "YQ==YQ==", "YQ===", "é", "data:image/png,abc", "data:image/png;base64", "YR=\0="]


@pytest.mark.parametrize("text", [*BAD_TEXTS, 5, None], ids=repr)
def test_invalid_base64_is_rejected_with_its_place(text):
    with pytest.raises(RejectedError) as caught:
        decode_text(text, "images[3]")
    reason = caught.value.reason
    assert reason.status == 400
    assert reason.code == ("bad_base64" if isinstance(text, str) else "malformed_request")
    assert reason.message.startswith("images[3]: ")


def parsed(value: Any) -> Upload:
    return parse_upload(value if isinstance(value, bytes) else orjson.dumps(value), 10_000, 3)


def test_a_body_has_one_image_or_several_images():
    image = EncodedImage(b"a")
    assert parsed({"image": "YQ=="}) == Upload([image])
    assert parsed({"images": ["YQ=="], "top_k": 2}) == Upload([image], is_list=True, top_k=2)
    assert parsed({"image": "", "top_k": 2**60}).top_k == 1_000_000
    assert parsed({"image": "", "top_k": None}).top_k is None


MALFORMED = [
    ["YQ=="], {}, {"image": None}, {"image": "YQ==", "topk": 1}, {"image": "YQ==", "images": ["YQ=="]},
    {"images": "YQ=="}, {"images": [["YQ=="]]}, {"url": "https://a.example/b"},
    *({"image": "YQ==", "top_k": top_k} for top_k in (0, 1.0, True)),
]  # fmt: skip
BAD_BODIES = [
    *((value, 400, "malformed_request") for value in MALFORMED),
    ({"images": []}, 422, "no_image"),
    ({"images": ["YQ=="] * 4}, 400, "too_many_images"),
    ({"image": "$"}, 400, "bad_base64"),
    (b'{"image": "YQ==', 400, "malformed_json"),
    (b'{"image": "YQ==", "image": "Yg=="}', 400, "duplicate_key"),
    (b"[" * 9000, 400, "malformed_json"),
    ({"image": "A" * 10_000}, 413, "json_too_large"),
]


@pytest.mark.parametrize(("value", "status", "code"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_an_invalid_body_is_rejected(value, status, code):
    with pytest.raises(RejectedError) as caught:
        parsed(value)
    assert (caught.value.reason.status, caught.value.reason.code) == (status, code)


@pytest.fixture(scope="module")
def text(jpeg) -> str:
    return base64.b64encode(jpeg).decode()


def test_images_in_json_have_the_same_response_as_raw_images(client, jpeg, text):
    plain = client.post("/v1/classify", content=jpeg).json()
    for image in (text, f"data:image/jpeg;base64,{text}", text.replace("+", "-").replace("/", "_")):
        assert client.post("/v1/classify", json={"image": image}).json() == plain
    assert client.post("/v1/classify", json={"images": [text]}).json() == {"results": [plain]}
    two = client.post("/v1/classify", json={"images": [text, "aGVsbG8="]}).json()["results"]
    bad = two[1]["error"]
    assert (two[0], bad["code"], bad["status"]) == (plain, "not_an_image", 415)


def test_top_k_in_the_query_overrides_the_body(client, text):
    for path, body, listed in (("", {"top_k": 2}, 2), ("?top_k=3", {"top_k": 2}, 3), ("", {}, 5)):
        reply = client.post(f"/v1/classify{path}", json={"image": text, **body})
        assert len(reply.json()["classes"]) == listed
