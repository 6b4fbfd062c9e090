"""Model card, gates, and the headers of the browser pages."""

import base64
import hashlib
import re
import shutil

import pytest

from sopdeploy.images.limits import describe_formats
from sopdeploy_service.api.status import read_card
from sopdeploy_service.api.web import DOCS, INDEX
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.service.conftest import running

RED = (255, 0, 0)


def test_the_card_has_readme_certificate_and_experts(gated_client, gated_bundle):
    card = gated_client.get("/v1/card").json()
    assert card["text"].startswith("# tiny\n")
    assert (card["bundle"], card["num_components"]) == (gated_bundle.name, 4)
    assert card["certificate"] == {
        "proof": "three-way",
        "compared": ["trained", "detached", "plain"],
        "detached": ["gate.noise"],
        "num_removed": 1,
        "bytes_removed": 8,
        "num_kept": 2,
        "root": "4" * 64,
        "onnx_root": "6" * 64,
        "num_operations": 3,
        "num_images": 12,
        "largest_difference": 0.0,
    }


def test_the_card_of_a_bundle_without_readme_is_empty_and_that_of_an_unknown_model_404(client, bundle):
    card = read_card(bundle)
    assert (card.text, card.certificate, card.num_components) == ("", None, 0)
    reply = client.get("/v1/card?model=other")
    assert (reply.status_code, reply.json()["code"]) == (404, "unknown_model")


def test_a_bundle_whose_folder_is_deleted_is_served_on(bundle_path, tmp_path, jpeg):
    folder = shutil.copytree(bundle_path, tmp_path / bundle_path.name)
    loaded = load_model(folder, Settings(threads=1))
    shutil.rmtree(folder)
    with running(loaded.runtime, loaded.bundle, Settings()) as client:
        for path in (
            "/v1/card",
            "/selftest",
            "/info",
            "/v2/models/tiny",
            "/readyz",
        ):
            assert client.get(path).status_code == 200
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_gates_lists_the_selected_experts_best_first_if_requested(gated_client, make_picture):
    red, yellow = (make_picture(color, kind="PNG") for color in (RED, (200, 190, 20)))
    found = gated_client.post("/v1/classify?gates=true", content=red).json()
    assert [entry["component"] for entry in found["gates"]] == [0]
    files = [("image", yellow), ("image", b"no image")]
    both = gated_client.post("/v1/classify?gates=true", files=files).json()["results"]
    assert [entry["component"] for entry in both[0]["gates"]] == [0, 1, 3]
    weights = [entry["weight"] for entry in both[0]["gates"]]
    assert weights == sorted(weights, reverse=True)
    assert both[1]["error"]["code"] == "not_an_image"
    for query in ("", "?gates=false"):
        assert "gates" not in gated_client.post(f"/v1/classify{query}", content=red).json()


@pytest.mark.parametrize(("path", "page"), [("/", INDEX), ("/docs", DOCS)])
def test_the_content_security_policy_allows_exactly_the_inline_scripts(client, path, page):
    reply = client.get(path)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    inline = re.findall(r"<(style|script)>(.*?)</\1>", reply.text, re.DOTALL)
    sources = re.findall(r"<(?:script|link)[^>]* (?:src|href)=\"(?!data:)([^\"]*)", reply.text)
    assert sources == (["docs/swagger-ui.css", "docs/swagger-ui-bundle.js"] if path == "/docs" else [])
    assert len(inline) == reply.text.count("<style") + reply.text.count("<script>")
    for _, text in inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|(src|href)=\"(https?:)?//", reply.text)
    assert reply.text == page.html.replace("{formats}", describe_formats())


def test_openapi_describes_every_error_as_a_problem(client):
    openapi = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in openapi["components"]["schemas"]
    ours = [verbs for path, verbs in openapi["paths"].items() if not path.startswith("/v2")]
    for verbs in ours:  # the Open Inference Protocol has other errors
        for about in verbs.values():
            errors = {status: body for status, body in about["responses"].items() if status >= "400"}
            assert all(set(body["content"]) == {"application/problem+json"} for body in errors.values())
