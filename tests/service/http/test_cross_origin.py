"""Pages of other servers: what browsers ask before, what they may read, and who is refused."""

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.settings import load_settings
from tests.support.fake_runtime import FakeRuntime

SHOP = "https://shop.example"
EVIL = "https://evil.example"
# Values of `allowed_origins`: origins that are allowed, and others
ORIGINS = {
    SHOP: ([SHOP], [EVIL, "http://shop.example", "https://a.shop.example", "null"]),
    "shop.example": ([SHOP, "http://shop.example:3000"], [EVIL]),
    "https://*.shop.example": (["https://a.shop.example"], [SHOP]),
    f"http://localhost:3000, {SHOP}": (
        ["http://localhost:3000", SHOP],
        ["http://localhost:3001"],
    ),
    "capacitor://localhost": (
        ["capacitor://localhost"],
        ["ionic://localhost", "https://localhost", "capacitor://evil"],
    ),
    "app://., Chrome-Extension://abcdef": (
        ["app://.", "chrome-extension://abcdef"],
        ["app://x", "chrome-extension://abcdeg", "app://"],
    ),
    "file://": (["file://"], ["app://", "null", SHOP]),
    "moz-extension://*": (
        ["moz-extension://3c078156-979c-498b-8990-85f7987dd929"],
        ["chrome-extension://abcdef", SHOP],
    ),
    "*": ([SHOP, EVIL, "null", "tauri://localhost"], []),
}
ASKED = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-api-key",
}


@pytest.mark.parametrize("allowed", ORIGINS)
def test_pages_of_allowed_origins_may_send_images_with_keys_and_read_answers(
    serve_with, jpeg, allowed: str, tmp_path
) -> None:
    secret = new_key(tmp_path / "keys.toml", "me")
    accepted, refused = ORIGINS[allowed]
    for keys in (None, tmp_path / "keys.toml"):
        client = serve_with(FakeRuntime(num_classes=7), allowed_origins=allowed, keys=keys)
        for origin in accepted:
            page = {"origin": origin, "sec-fetch-site": "cross-site"}
            asked = client.options("/v1/classify", headers={**page, **ASKED})
            assert asked.status_code == 200
            names = asked.headers["access-control-allow-headers"].lower()
            assert "x-api-key" in names
            assert "authorization" in names
            sent = client.post(
                "/v1/classify", content=jpeg, headers={**page, "x-api-key": secret}
            )
            assert sent.status_code == 200
            assert sent.headers["access-control-allow-origin"] in {origin, "*"}
            assert "Origin" in sent.headers.get("vary", "") or allowed == "*"
            failed = client.post(
                "/v1/classify", content=b"", headers={**page, "x-api-key": secret}
            )
            assert failed.status_code == 400
            # The page reads why
            assert failed.headers["access-control-allow-origin"] in {origin, "*"}
        for origin in refused:
            page = {"origin": origin, "sec-fetch-site": "cross-site"}
            asked = client.options("/v1/classify", headers={**page, **ASKED})
            assert asked.status_code == 400
            assert asked.headers.get("access-control-allow-origin") is None
            sent = client.post(
                "/v1/classify", content=jpeg, headers={**page, "x-api-key": secret}
            )
            assert sent.headers.get("access-control-allow-origin") is None
            assert "Origin" in sent.headers["vary"]
            assert sent.status_code == (200 if keys else 403)


def test_pages_of_allowed_origins_may_send_and_read_every_header(serve_with) -> None:
    client = serve_with(FakeRuntime(num_classes=7), allowed_origins=SHOP)
    names = "inference-header-content-length,traceparent,x-request-id,x-request-timeout-ms"
    asked = client.options(
        "/v2", headers={"origin": SHOP, **ASKED, "access-control-request-headers": names}
    )

    assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, names)

    sent = client.get("/v2/none", headers={"origin": SHOP})
    assert "x-error-code" in sent.headers
    # With this value, and for responses that allow no credentials, browsers let a page read all
    # headers.
    assert sent.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in sent.headers


def test_a_refused_page_is_told_the_setting_that_allows_it(serve_with, jpeg) -> None:
    client = serve_with(FakeRuntime(num_classes=7))
    for method in ("POST", "OPTIONS"):
        reply = client.request(
            method, "/v1/classify", content=jpeg, headers={"origin": SHOP, **ASKED}
        )
        assert reply.status_code == 403
        assert "allowed_origins" in reply.json()["detail"]

    named = client.get("/info", headers={"host": "other.example"})
    assert "allowed_hosts" in named.json()["detail"]


def test_an_allowed_origin_is_not_a_name_of_this_server(serve_with) -> None:
    client = serve_with(FakeRuntime(num_classes=7), allowed_origins="*,https://shop.example")
    reply = client.get("/info", headers={"host": "shop.example", "origin": SHOP})

    assert (reply.status_code, reply.json()["code"]) == (403, "foreign_request")


@pytest.mark.parametrize(
    "text",
    ["a b", "https://", "shop.example/ml", "https://*", "https://.", "app://*.*", "1://a"],
)
def test_a_text_that_is_not_an_origin_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        load_settings(allowed_origins=text)


def test_a_page_of_the_internet_may_use_a_private_server_if_allowed(serve_with) -> None:
    client = serve_with(FakeRuntime(num_classes=7), allowed_origins=SHOP)
    asked = {"origin": SHOP, **ASKED, "access-control-request-private-network": "true"}
    reply = client.options("/v1/classify", headers=asked)

    assert reply.status_code == 200
    assert reply.headers["access-control-allow-private-network"] == "true"
