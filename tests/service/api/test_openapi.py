"""Schemathesis: requests generated from the OpenAPI description never cause a server error."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

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


def test_no_valid_request_is_a_server_error(client, openapi):
    sent = 0
    for operation in schemathesis.openapi.from_dict(openapi).get_all_operations():

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.ok().as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            reply = case.call(base_url=str(client.base_url).rstrip("/"))
            assert reply.status_code < 500, case.as_curl_command()
            sent += 1

        send()
    assert sent > 10 * EXAMPLES
    assert client.get("/readyz").status_code == 200
