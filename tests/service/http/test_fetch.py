"""A URL is fetched from listed public hosts only; no name, address, redirect or stream gets around that."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from sopdeploy_service.http.fetch import fetch, is_public
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.settings import Settings

PUBLIC = "93.184.216.34"
OPEN = Settings(url_hosts=("img.example", "img.example:8443"), url_seconds=2, max_body_bytes=1000)


class Resolver:
    """Gives each of *answers* once, in turn, and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0)


class LimitedHttpProtocol(httpx.AsyncBaseTransport):
    """Gives *reply* to every request and remembers it."""

    def __init__(self, reply: httpx.Response | None = None) -> None:
        self.reply = reply or httpx.Response(200, stream=httpx.ByteStream(b"image"))
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.reply


def got(
    url: str,
    wire: LimitedHttpProtocol | None = None,
    resolver: Resolver | None = None,
    settings: Settings = OPEN,
) -> bytes:
    return asyncio.run(
        fetch(url, settings, resolve=resolver or Resolver([PUBLIC]), transport=wire or LimitedHttpProtocol())
    )


def refused(url: str, *args: object, **options: object) -> tuple[str, int]:
    with pytest.raises(RejectedError) as caught:
        got(url, *args, **options)
    return caught.value.refusal.code, caught.value.refusal.status


def test_urls_are_refused_until_hosts_are_listed():
    assert refused("https://img.example/a", settings=Settings()) == ("url_input_off", 403)


def test_hosts_are_listed_with_commas_in_the_environment(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_URL_HOSTS", "IMG.example, other.example:8443,")
    assert Settings().url_hosts == ("img.example", "other.example:8443")
    assert Settings(url_hosts=["img.example"]).url_hosts == ("img.example",)
    assert Settings(url_hosts="").url_hosts == ()


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1::1"])
def test_the_connection_goes_to_the_resolved_address_with_the_name_of_the_host(address):
    wire, resolver = LimitedHttpProtocol(), Resolver([address])
    assert got("https://IMG.example/a?b=c", wire, resolver) == b"image"
    (request,) = wire.requests
    assert request.url.host == address
    assert request.url.raw_path == b"/a?b=c"
    assert request.headers["host"] == "img.example"
    assert request.extensions["sni_hostname"] == "img.example"
    assert resolver.asked == [("img.example", 443)]


def test_a_listed_port_is_used():
    wire, resolver = LimitedHttpProtocol(), Resolver([PUBLIC])
    got("https://img.example:8443/a", wire, resolver)
    assert (wire.requests[0].url.port, wire.requests[0].headers["host"]) == (8443, "img.example:8443")
    assert resolver.asked == [("img.example", 8443)]


def test_a_name_that_is_bound_again_is_never_asked_for_twice():
    wire, resolver = LimitedHttpProtocol(), Resolver([PUBLIC], ["127.0.0.1"])
    got("https://img.example/a", wire, resolver)
    assert len(resolver.asked) == 1
    assert wire.requests[0].url.host == PUBLIC


PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",  # noqa: S104
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "ff02::1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::1",
    "2001:0:7f00:1::1",
    "2001:db8::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused_alone_and_among_public_ones(address):
    for answers in ([address], [PUBLIC, address]):
        wire = LimitedHttpProtocol()
        assert refused("https://img.example/a", wire, Resolver(answers)) == ("url_not_allowed", 403)
        assert wire.requests == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_are_public(address):
    assert is_public(address)


FORBIDDEN = [
    "file:///etc/passwd",
    "http://img.example/a",
    "ftp://img.example/a",
    "gopher://img.example",
    "//img.example/a",
    "img.example/a",
    "https://",
    "https://other.example/a",
    "https://img.example.other/a",
    "https://img.example:22/a",
    "https://img.example./a",
    "https://user@img.example/a",
    "https://user:pass@img.example/a",
    "https://img.example@127.0.0.1/",
    "https://127.0.0.1/",
    "https://0x7f.1/",
    "https://2130706433/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://169.254.169.254/latest/meta-data",
    "https://localhost/",
    "data:image/png;base64,YQ",
]


@pytest.mark.parametrize("url", ["", *FORBIDDEN])
def test_what_is_not_listed_is_refused_before_anything_is_asked(url):
    resolver = Resolver()
    assert refused(url, resolver=resolver) == ("url_not_allowed", 403)
    assert resolver.asked == []


@pytest.mark.parametrize(
    "url", ["https://[::1", "https://a:b:c/", "https://a\n/b", "https://" + "a" * 70_000]
)
def test_what_is_no_url_is_refused(url):
    assert refused(url) == ("bad_url", 400)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/", "https://0x7f.1/", "https://[::ffff:127.0.0.1]/", "https://localhost/"]
)
def test_even_a_listed_host_must_be_public_for_the_resolver_of_the_system(url):
    settings = Settings(url_hosts=("127.0.0.1", "0x7f.1", "::ffff:127.0.0.1", "localhost"))
    with pytest.raises(RejectedError) as caught:
        asyncio.run(fetch(url, settings))
    assert caught.value.refusal.status in {403, 422}


def test_a_host_without_an_address_is_told():
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("no such host")

    with pytest.raises(RejectedError) as caught:
        asyncio.run(fetch("https://img.example/", OPEN, resolve=unknown))
    assert caught.value.refusal.code == "url_unreachable"
    assert refused("https://img.example/", resolver=Resolver([])) == ("url_unreachable", 422)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    wire = LimitedHttpProtocol(httpx.Response(status, headers={"Location": "http://127.0.0.1/"}))
    assert refused("https://img.example/a", wire) == ("url_not_allowed", 403)
    assert len(wire.requests) == 1


@pytest.mark.parametrize("status", [204, 404, 500])
def test_another_status_than_200_is_told(status):
    assert refused("https://img.example/a", LimitedHttpProtocol(httpx.Response(status))) == (
        "url_unreachable",
        422,
    )


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


def test_an_endless_stream_is_cut_at_the_limit():
    stream = Endless(0)
    assert refused("https://img.example/a", LimitedHttpProtocol(httpx.Response(200, stream=stream))) == (
        "too_large",
        413,
    )
    assert stream.sent == 1100


def test_a_slow_stream_is_cut_at_the_time():
    settings = Settings(url_hosts=("img.example",), url_seconds=0.3)
    began = time.monotonic()
    wire = LimitedHttpProtocol(httpx.Response(200, stream=Endless(0.05)))
    assert refused("https://img.example/a", wire, settings=settings) == ("url_timeout", 504)
    assert time.monotonic() - began < 5


def test_a_slow_resolver_is_cut_at_the_time():
    async def slow(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(30)
        return [PUBLIC]

    settings = Settings(url_hosts=("img.example",), url_seconds=0.1)
    with pytest.raises(RejectedError) as caught:
        asyncio.run(fetch("https://img.example/", settings, resolve=slow))
    assert caught.value.refusal.code == "url_timeout"


class LabeledImages(BaseHTTPRequestHandler):
    """Answers every path with the host it was asked for."""

    def do_GET(self) -> None:
        body = self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), LabeledImages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_real_connection_goes_to_the_pinned_address(pictures, monkeypatch):
    """The name does not exist, so only the pinned address can have been connected to."""
    monkeypatch.setattr("sopdeploy_service.http.fetch.is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    place = f"img.invalid:{pictures}"
    settings = Settings(url_hosts=(place,), url_plain_http=True)
    found = asyncio.run(fetch(f"http://{place}/", settings, resolve=Resolver(["127.0.0.1"])))
    assert found == place.encode()


def test_a_server_that_does_not_speak_tls_is_told(pictures, monkeypatch):
    monkeypatch.setattr("sopdeploy_service.http.fetch.is_public", lambda address: True)
    place = f"img.invalid:{pictures}"
    settings = Settings(url_hosts=(place,))
    with pytest.raises(RejectedError) as caught:
        asyncio.run(fetch(f"https://{place}/", settings, resolve=Resolver(["127.0.0.1"])))
    assert caught.value.refusal.code == "url_unreachable"
