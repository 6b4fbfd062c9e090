"""Which requests go through a proxy: one rule for the client, `health` and `classify`."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.backbones.efficientnet import EfficientNetLiteConfig
from sopdeploy.client import Client
from sopdeploy.errors import ConfigError, UnreachableError
from sopdeploy.importers.published import fetch_imagenet_weights
from sopdeploy.proxies import find_proxy, is_this_machine, requested_url, store_options
from sopdeploy_commands.app import app
from tests.support.stub_server import reply, stub_server

FAR = "http://server.example:8000"
PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variables of this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


THIS_MACHINE = [
    "localhost",
    "LOCALHOST.",
    "api.localhost",
    "127.0.0.1",
    "127.9.9.9",
    "::1",
    "0:0:0:0:0:0:0:1",
    "0.0.0.0",  # noqa: S104 - the address of all interfaces
    socket.gethostname(),
]
OTHERS = [
    "server.example",
    "192.0.2.1",
    "2001:db8::1",
    "localhost.example",
    "127.0.0.1.example",
    "",
]


@pytest.mark.parametrize(("names", "expected"), [(THIS_MACHINE, True), (OTHERS, False)])
def test_every_spelling_of_this_machine_is_recognized(names: list[str], expected: bool) -> None:
    assert {name: is_this_machine(name) for name in names} == dict.fromkeys(names, expected)


def test_a_server_on_this_machine_is_requested_directly_whatever_the_variables_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("http://127.0.0.1:9", "socks://127.0.0.1:9", "http://[::1", ":"):
        monkeypatch.setenv("ALL_PROXY", value)
        for host in THIS_MACHINE:
            host = f"[{host}]" if ":" in host else host
            assert find_proxy(f"http://{host}:8000/path") is None
            Client(f"http://{host}:8000").close()


# Variables, and the one that is used for FAR.
USED: dict[str, tuple[dict[str, str], str | None]] = {
    "none": ({}, None),
    "http": ({"HTTP_PROXY": PROXY, "ALL_PROXY": "http://other.example"}, "HTTP_PROXY"),
    "lower case first": (
        {"HTTP_PROXY": "http://other.example", "http_proxy": PROXY},
        "http_proxy",
    ),
    "all": ({"ALL_PROXY": PROXY, "HTTPS_PROXY": "http://other.example"}, "ALL_PROXY"),
    "without a scheme": ({"HTTP_PROXY": PROXY.removeprefix("http://")}, "HTTP_PROXY"),
    "empty": ({"HTTP_PROXY": ""}, None),
}


@pytest.mark.parametrize("case", USED)
def test_the_variables_are_those_of_other_programs(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, used = USED[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find_proxy(FAR)
    assert (found and found.variable) == used
    assert found is None or found.url == PROXY


# NO_PROXY, and whether it excludes: server.example:8000, 192.0.2.7:8000, [fd07::1]:8000.
EXCLUDED: dict[str, tuple[bool, bool, bool]] = {
    "*": (True, True, True),
    " other.example , .EXAMPLE": (True, False, False),
    "server.example:9000": (False, False, False),
    "er.example": (False, False, False),
    "192.0.2.0/24": (False, True, False),
    "fd07:0::1": (False, False, True),
    "fd07::/64 192.0.2.7": (False, True, True),
    "::/,,/,[,]:,:,.": (False, False, False),
    "": (False, False, False),
}


@pytest.mark.parametrize("value", EXCLUDED)
def test_no_proxy_lists_names_addresses_and_networks(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", value)
    urls = (FAR, "http://192.0.2.7:8000", "http://[fd07::1]:8000")
    assert tuple(find_proxy(url) is None for url in urls) == EXCLUDED[value]
    for url in urls:
        Client(url).close()


WRONG = [
    "socks://proxy.example:9",
    "http://",
    "http://a:port",
    "http://pr\noxy",
    "u:secret@a:b:c",
    "http://u:secret@x@pröxy.example",
]


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_proxy_is_one_line_with_its_variable_and_without_its_password(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    calls = (
        lambda: Client(FAR),
        lambda: store_options(FAR),
        lambda: store_options("hf://owner/name/photos"),
        lambda: fetch_imagenet_weights("efficientnet-lite2", EfficientNetLiteConfig()),
    )

    for call in calls:
        with pytest.raises(ConfigError, match=r"ALL_PROXY.*NO_PROXY") as caught:
            call()  # type: ignore[no-untyped-call]
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)

    health = CliRunner().invoke(app, ["health", "--url", FAR])
    assert (health.exit_code, health.stderr.count("\n"), "ALL_PROXY" in health.stderr) == (
        2,
        1,
        True,
    )


@pytest.fixture
def closed() -> Iterator[str]:
    """The address of a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_proxy_that_does_not_answer_is_named_with_its_variable(
    closed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://u:secret@{closed}")
    named = f"through the proxy http://{closed} (HTTP_PROXY)"
    with Client(FAR, retries=0) as client, pytest.raises(UnreachableError) as caught:
        client.classify(b"x")
    health = CliRunner().invoke(app, ["health", "--url", FAR])

    assert health.exit_code == 1
    for message in (str(caught.value), " ".join(health.stderr.split())):
        assert named in message
        assert "secret" not in message


def test_a_request_through_a_proxy_has_its_url_and_its_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with stub_server(lambda _: reply(b'{"status":"ok","classes":[]}')) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//u:secret@"))
        with Client(FAR) as client:
            assert client.classify(b"x").classes == ()
        assert CliRunner().invoke(app, ["health", "--url", f"{FAR}/root/"]).exit_code == 0

    heads = [request.head.decode() for request in proxy.received]
    targets = {head.split()[1] for head in heads}
    assert targets == {f"{FAR}/v1/classify", f"{FAR}/root/readyz"}
    assert all("proxy-authorization: basic dtpzzwnyzxq=" in head.lower() for head in heads)


@pytest.mark.parametrize(
    ("endpoint", "is_direct"),
    [("http://127.0.0.1:9000", True), ("http://store.example", False), ("", False)],
)
def test_a_store_on_this_machine_is_requested_directly(
    endpoint: str, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert store_options("s3://bucket/photos") == (
        {"config_kwargs": {"proxies": {}}} if is_direct else {}
    )
    assert requested_url("s3://bucket/photos") == (
        endpoint or "https://s3.amazonaws.com"
    )  # for messages
    assert store_options("http://localhost/photos") == store_options("hf://owner/name") == {}
    assert store_options(f"{FAR}/photos") == {"proxy": PROXY}
