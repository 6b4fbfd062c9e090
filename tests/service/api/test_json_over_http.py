"""JSON bodies of `/v1/classify` are answered like the images in them."""

import base64

import pytest

from sopdeploy_service.http import fetch


@pytest.fixture(scope="module")
def text(jpeg) -> str:
    return base64.b64encode(jpeg).decode()


def test_an_image_in_json_is_answered_like_the_image_itself(client, jpeg, text):
    plain = client.post("/v1/classify", content=jpeg).json()
    for image in (text, f"data:image/jpeg;base64,{text}", text.replace("+", "-").replace("/", "_")):
        assert client.post("/v1/classify", json={"image": image}).json() == plain


def test_a_list_in_json_is_answered_with_results_even_where_it_holds_one(client, jpeg, text):
    plain = client.post("/v1/classify", content=jpeg).json()
    assert client.post("/v1/classify", json={"images": [text]}).json() == {"results": [plain]}
    two = client.post("/v1/classify", json={"images": [text, "aGVsbG8="]}).json()["results"]
    assert two[0] == plain
    assert two[1]["error"]["code"] == "not_an_image"


def test_the_number_of_classes_may_stand_in_the_body_and_the_query_wins(client, text):
    def classes(path: str, **body: object) -> int:
        return len(client.post(path, json={"image": text, **body}).json()["classes"])

    assert classes("/v1/classify", top_k=2) == 2
    assert classes("/v1/classify?top_k=3", top_k=2) == 3
    assert classes("/v1/classify") == 5


REFUSED = {
    "bad base64": ({"image": "!"}, 400, "bad_base64"),
    "an unknown key": ({"picture": ""}, 400, "malformed_request"),
    "an empty image": ({"image": ""}, 400, "empty_body"),
    "no image": ({"image": "aGVsbG8="}, 415, "not_an_image"),
    "too many": ({"images": ["aGVsbG8="] * 9}, 400, "too_many_images"),
    "a URL": ({"url": "https://img.example/a.jpg"}, 403, "url_input_off"),
    "a file": ({"url": "file:///etc/passwd"}, 403, "url_input_off"),
    "too large": ({"image": "A" * 1_000_000}, 413, "too_large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_body_is_refused_and_the_next_request_answered(client, text, case):
    body, status, code = REFUSED[case]
    reply = client.post("/v1/classify", json=body)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert client.post("/v1/classify", json={"image": text}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"image": "", "image": ""}', b"\xff"])
def test_a_body_that_is_no_json_is_refused(client, body):
    reply = client.post(
        "/v1/classify", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert reply.status_code == 400
    assert reply.json()["code"] in {"malformed_json", "duplicate_key"}


def test_the_image_behind_a_url_is_answered_where_its_host_is_listed(
    serve_with, onnx_runtime, jpeg, monkeypatch
):
    async def found(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    async def downloaded(target, address, limit, transport) -> bytes:
        assert (target.host, address) == ("img.example", "93.184.216.34")
        return jpeg if target.path == "/a.jpg" else b"<html>"

    monkeypatch.setattr(fetch, "system_addresses", found)
    monkeypatch.setattr(fetch, "download", downloaded)
    client = serve_with(onnx_runtime, url_hosts="img.example, other.example")
    plain = client.post("/v1/classify", content=jpeg).json()
    assert client.post("/v1/classify", json={"url": "https://img.example/a.jpg"}).json() == plain
    html = client.post("/v1/classify", json={"url": "https://img.example/b"})
    assert (html.status_code, html.json()["code"]) == (415, "not_an_image")
    inside = client.post("/v1/classify", json={"url": "https://169.254.169.254/latest"})
    assert (inside.status_code, inside.json()["code"]) == (403, "url_not_allowed")
