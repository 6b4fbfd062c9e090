"""The OpenAPI description and the table of errors in `docs/http.md` are those of the server."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings

from sopdeploy_service.http.api_keys import new_key
from tests.support.fake_runtime import FakeRuntime

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 4


@pytest.fixture(scope="module")
def openapi(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_openapi_has_every_endpoint_of_the_protocol(openapi):
    endpoints = {path for path in openapi["paths"] if path.startswith("/v2")}
    model = {f"/v2/models/{{name}}{version}" for version in ("", "/versions/{version}")}

    assert endpoints == {
        *("/v2", "/v2/health/live", "/v2/health/ready"),
        *(path + suffix for path in model for suffix in ("", "/ready", "/infer")),
    }


def test_every_error_outside_of_the_protocol_is_described_as_a_problem(openapi):
    assert "HTTPValidationError" not in openapi["components"]["schemas"]

    paths = [verbs for path, verbs in openapi["paths"].items() if not path.startswith("/v2")]
    answers = [about["responses"] for verbs in paths for about in verbs.values()]
    errors = [body for found in answers for status, body in found.items() if status >= "400"]

    assert {kind for body in errors for kind in body["content"]} == {"application/problem+json"}


def test_no_parameter_of_a_path_may_be_null(openapi):
    """Generators of clients leave out paths with such a parameter."""
    parameters = [
        parameter
        for verbs in openapi["paths"].values()
        for about in verbs.values()
        for parameter in about.get("parameters", ())
        if parameter["in"] == "path"
    ]

    assert len(parameters) >= 9
    assert {parameter["schema"].get("type") for parameter in parameters} <= {
        "string",
        "integer",
    }


def test_an_image_may_be_sent_as_bytes_of_any_type(openapi):
    for path in ("/v1/classify", "/v1/embed"):
        content = openapi["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/octet-stream"] == content["image/*"]


def test_a_server_with_keys_describes_both_headers_for_them(openapi, serve_with, tmp_path):
    assert "security" not in openapi

    keys = tmp_path / "keys.toml"
    headers = {"x-api-key": new_key(keys, "free")}
    client = serve_with(FakeRuntime(num_classes=7), keys=str(keys))
    described = client.get("/openapi.json", headers=headers).json()

    assert set(described["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    assert described["security"] == [{"bearer": []}, {"apiKey": []}]


@pytest.mark.slow
def test_no_valid_request_is_a_server_error(client, openapi):
    sent = 0
    for operation in schemathesis.openapi.from_dict(openapi).get_all_operations():

        @settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate])
        @given(case=operation.ok().as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            reply = case.call(base_url=str(client.base_url).rstrip("/"))
            assert reply.status_code < 500, case.as_curl_command()
            sent += 1

        send()
    assert sent > 10 * EXAMPLES
    assert client.get("/readyz").status_code == 200


ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
SERVICE = ROOT / "service" / "sopdeploy_service"
IMAGES = ROOT / "sopdeploy" / "images"  # decoding, shared with training
FRAMEWORK = {"not_found", "method_not_allowed"}  # derived from the status by `problems`
# Pairs of code and status in `decoding.child`
OF_THE_CHILD = {"too_much_memory", "decoder_failed"}
CODE = re.compile(r'(?:(?:HttpError|bad_request|_invalid)\((?:\s|#.*)*|code=)"([a-z0-9_]+)"')


def test_the_page_lists_every_code_and_no_other():
    table = PAGE.partition("## Errors")[2]
    named = {
        code
        for row in re.findall(r"^\| \d+.*$", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", row)
    }
    modules = [*SERVICE.rglob("*.py"), *IMAGES.glob("*.py")]
    written = {
        code for module in modules for code in CODE.findall(module.read_text(encoding="utf-8"))
    }

    assert named - FRAMEWORK - OF_THE_CHILD == written
