"""URL fetching: only allowed public hosts, whatever names, addresses, redirects or streams are used."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from sopdeploy_service.http import fetch as fetching
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.settings import Settings, load_settings

PUBLIC = "93.184.216.34"
ALLOWED = Settings(url_hosts=("img.example", "img.example:8443"), url_seconds=2, max_body_bytes=1000)
URL = "https://img.example/a"


class Resolver:
    """Gives each of *results* once, in turn; a float is a delay, an exception is raised."""

    def __init__(self, *results: Sequence[str] | float | OSError) -> None:
        self.results = list(results)
        self.calls: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.calls.append((host, port))
        result = self.results.pop(0)
        if isinstance(result, OSError):
            raise result
        if isinstance(result, float):
            await asyncio.sleep(result)
            return [PUBLIC]
        return result


class Transport(httpx.MockTransport):
    """Gives *response* to every request and records it."""

    def __init__(self, response: httpx.Response | None = None) -> None:
        self.requests: list[httpx.Request] = []
        response = response or httpx.Response(200, stream=httpx.ByteStream(b"image"))
        super().__init__(lambda request: self.requests.append(request) or response)


def got(
    url: str,
    transport: httpx.AsyncBaseTransport | None = None,
    resolver: Resolver | None = None,
    settings: Settings = ALLOWED,
) -> bytes:
    connected = partial(httpx.AsyncClient, transport=transport or Transport())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "resolve", resolver or Resolver([PUBLIC]))
        patch.setattr(fetching.httpx, "AsyncClient", connected)
        return asyncio.run(fetching.fetch(url, settings))


def rejected(*args: object, **options: object) -> tuple[str, int]:
    with pytest.raises(RejectedError) as caught:
        got(*args, **options)
    return caught.value.reason.code, caught.value.reason.status


def test_no_url_is_fetched_without_allowed_hosts():
    assert rejected(URL, settings=Settings()) == ("url_input_off", 403)


def test_the_setting_accepts_comma_separated_hosts(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_URL_HOSTS", "IMG.example, other.example:8443,")
    assert load_settings().url_hosts == ("img.example", "other.example:8443")
    assert Settings(url_hosts=["img.example"]).url_hosts == ("img.example",)
    assert Settings(url_hosts="").url_hosts == ()


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1::1"])
def test_the_connection_uses_the_resolved_address_and_the_host_name(address):
    transport, resolver = Transport(), Resolver([address], ["127.0.0.1"])
    assert got("https://IMG.example:8443/a?b=c", transport, resolver) == b"image"
    (request,) = transport.requests
    assert (request.url.host, request.url.raw_path, request.url.port) == (address, b"/a?b=c", 8443)
    assert request.headers["host"] == "img.example:8443"
    assert request.extensions["sni_hostname"] == "img.example"
    assert resolver.calls == [("img.example", 8443)]  # once: a second DNS response could differ


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("IMG.example", "https://img.example/a"),
        ("b\xfccher.example:443", "https://xn--bcher-kva.example/a"),
        ("cdn.b\xfccher.example:8443", "https://cdn.b\xfccher.example:8443/a"),
        ("2606:2800::1", "https://[2606:2800::1]/a"),
        ("[2606:2800::1]:8443", "https://[2606:2800::1]:8443/a"),
    ],
)
def test_an_allowed_host_may_be_written_as_in_a_url(host, url):
    settings = Settings(url_hosts=[host])
    assert got(url, settings=settings) == b"image"
    assert rejected("https://other.example", settings=settings) == ("url_not_allowed", 403)


PRIVATE = [
    *("127.0.0.1", "0.0.0.0", "10.0.0.1", "192.168.1.1", "169.254.169.254"),  # noqa: S104
    *("100.64.0.1", "224.0.0.1", "192.0.2.1", "::1", "::", "::ffff:127.0.0.1", "fe80::1%eth0"),
    *("fd00::1", "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::1", "2001:0:7f00:1::1", "2001:db8::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_rejected_alone_and_among_public_ones(address):
    for addresses in ([address], [PUBLIC, address]):
        transport = Transport()
        assert rejected(URL, transport, Resolver(addresses)) == ("url_not_allowed", 403)
        assert transport.requests == []


FORBIDDEN = [
    *("", "img.example/a", "data:image/png;base64,YQ", "file:///etc/passwd", "http://img.example/a"),
    *("https://other.example/a", "https://img.example.other/a", "https://img.example:22/a"),
    *("https://user@img.example/a", "https://img.example@127.0.0.1/", "https://0x7f.1/"),
    *("https://2130706433/", "https://[::ffff:127.0.0.1]/", "https://169.254.169.254/latest/meta-data"),
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_other_urls_are_rejected_before_the_name_is_resolved(url):
    resolver = Resolver()
    assert rejected(url, resolver=resolver) == ("url_not_allowed", 403)
    assert resolver.calls == []


def test_invalid_urls_and_hosts_without_an_address_are_rejected():
    for url in ("https://[::1", "https://a\n/b", "https://" + "a" * 70_000):
        assert rejected(url) == ("bad_url", 400)
    for resolver in (Resolver([]), Resolver(OSError("no such host"))):
        assert rejected(URL, resolver=resolver) == ("url_unreachable", 422)


@pytest.mark.parametrize(
    ("status", "expected"), [(302, ("url_not_allowed", 403)), (404, ("url_unreachable", 422))]
)
def test_redirects_are_not_followed_and_other_statuses_are_unreachable(status, expected):
    transport = Transport(httpx.Response(status, headers={"Location": "http://127.0.0.1/"}))
    assert rejected(URL, transport) == expected
    assert len(transport.requests) == 1


class Endless(httpx.AsyncByteStream):
    """100 bytes again and again, *seconds* between them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.sent = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent += 100
            yield bytes(100)
            await asyncio.sleep(self.seconds)


def test_an_endless_stream_is_cut_at_the_size_limit():
    stream = Endless(0)
    assert rejected(URL, Transport(httpx.Response(200, stream=stream))) == ("too_large", 413)
    assert stream.sent == 1100


@pytest.mark.parametrize("slow", ["stream", "resolver"])
def test_a_slow_stream_and_a_slow_resolver_end_at_the_timeout(slow):
    settings = Settings(url_hosts=("img.example",), url_seconds=0.3)
    began = time.monotonic()
    transport = Transport(httpx.Response(200, stream=Endless(0.05)))
    resolver = Resolver([PUBLIC] if slow == "stream" else 30.0)
    assert rejected(URL, transport, resolver, settings) == ("url_timeout", 504)
    assert time.monotonic() - began < 20


class EchoHost(BaseHTTPRequestHandler):
    """Responds to every path with the `Host` of the request."""

    def do_GET(self) -> None:
        body = self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local server under a host name that does not exist, and whose address counts as public."""
    monkeypatch.setattr("sopdeploy_service.http.fetch.is_public", lambda address: address == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), EchoHost) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"img.invalid:{server.server_port}"
        server.shutdown()


def test_a_real_connection_uses_the_resolved_address_and_no_proxy(place, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(fetching, "resolve", Resolver(["127.0.0.1"], ["127.0.0.1"]))
    settings = Settings(url_hosts=(place,), url_plain_http=True)
    found = asyncio.run(fetching.fetch(f"http://{place}/", settings))
    assert found == place.encode()
    with pytest.raises(RejectedError) as caught:  # this server has no TLS
        asyncio.run(fetching.fetch(f"https://{place}/", settings))
    assert caught.value.reason.code == "url_unreachable"
