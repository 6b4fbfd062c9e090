"""The names under which clients reach this server, and the pages whose requests it answers.

Browsers let every page send requests to this machine. `Origin` and `Sec-Fetch-Site` reveal a
page of another host. If that host was made to resolve to this machine (DNS rebinding), they do
not, but `Host` is then its name. Behind a proxy, `Host` is the name that the proxy chooses, and
`X-Forwarded-Host` and `X-Forwarded-Proto` are what the browser sees; anyone can send these, so
only those of trusted proxies count.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

Network: TypeAlias = IPv4Network | IPv6Network

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_NAME = 253  # characters (RFC 1035, section 2.3.4, without the dot at the end)
MAX_SCHEME = 40
MAX_TEXT = MAX_SCHEME + len("://*.") + MAX_NAME + len(".:65535")
FOREIGN_PAGES = "requests of pages of other hosts"
MAX_ADDRESS = 64  # characters of an IP address with its zone
# The host of the requests of Starlette's `TestClient`, and its address, which no network has
TEST_HOST = "testserver"
TEST_PEER = "testclient"
ANY_NAME = "*"  # of a scheme that is not of the web, such as that of extensions
_PATTERN = re.compile(
    rf"(?:(?P<scheme>[a-z][a-z0-9+.-]{{0,{MAX_SCHEME - 1}}})://)?"
    r"(?P<subdomains>\*\.)?"
    r"(?P<host>\*|[^/\s*@?#]+|(?<=file://))",  # pages in the files of an app have no host
    re.IGNORECASE,
)


class HostPattern(NamedTuple):
    """Hosts and origins; without a scheme, those of the web, and without a port, those with any.

    *name* is in lower case and in ASCII. A pattern for subdomains has all below *name*, but not
    itself; one with the name `*` has all of its scheme.
    """

    scheme: str | None
    name: str
    port: int | None
    is_for_subdomains: bool = False

    def matches(self, host: "HostPattern") -> bool:
        """Tell whether *host*, the value of a header, is among these hosts."""
        if host.is_for_subdomains:  # a pattern, which no client sends
            return False

        # The name.
        if self.is_for_subdomains:
            has_name = host.name.endswith(f".{self.name}")
        else:
            has_name = self.name in {host.name, ANY_NAME}

        # The scheme, which only an origin has; the header `Host` has none.
        schemes = DEFAULT_PORTS if self.scheme is None else {self.scheme}
        has_scheme = host.scheme is None or host.scheme in schemes

        return has_name and has_scheme and self._has_port_of(host)

    def _has_port_of(self, host: "HostPattern") -> bool:
        """Tell whether the port of *host*, or the default port of its scheme, is that of these hosts."""
        port = self.port or DEFAULT_PORTS.get(self.scheme or "")
        if port is None:  # any
            return True

        # `Host: a.example` means a default port that only the proxy knows, so it can be any.
        if not host.port and host.scheme is None:
            return True
        return (host.port or DEFAULT_PORTS.get(host.scheme or "")) == port


@functools.lru_cache(maxsize=256)
def parse_host(text: str) -> HostPattern:
    """Parse a host or origin, such as `example.com:8000`, or a pattern such as `https://*.example.com`.

    An origin may have any scheme, also that of an app, such as `capacitor://localhost`; those of
    extensions are `moz-extension://*`. Raises `ValueError` if *text* is none of these.
    """
    match = _PATTERN.fullmatch(text) if len(text) <= MAX_TEXT else None
    if match is None:
        raise ValueError(
            f"{text[:100]!r} is not a host such as example.com, *.example.com, https://example.com or app://name"
        )
    scheme = match["scheme"].lower() if match["scheme"] else None
    is_web = scheme is None or scheme in DEFAULT_PORTS
    is_for_subdomains = match["subdomains"] is not None

    # The name in ASCII. The dot that may end it is dropped, but `.` alone is a host of apps.
    parts = urlsplit(f"//{match['host']}")  # raises ValueError for brackets that do not match
    name = parts.hostname or ""
    if is_web or name != ".":
        name = name.removesuffix(".")
    if not name.isascii():
        name = name.encode("idna").decode()  # raises UnicodeError, which is a ValueError

    # The web has no pattern for all hosts.
    if len(name) > MAX_NAME or (not name and match["host"]):
        raise ValueError(f"{text!r} has no host, or one of more than {MAX_NAME} characters")
    if name == ANY_NAME and (is_web or is_for_subdomains):
        raise ValueError(
            f"{text!r} has no name; only schemes of apps and extensions can have `*`"
        )

    return HostPattern(scheme, name, parts.port, is_for_subdomains)


def join_headers(lines: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers in *lines*, whose names are in lower case; repeated ones are joined by `, `.

    That is what they mean if they are lists (RFC 9110, section 5.3). Others become invalid: a
    proxy in front could use another line than this server.
    """
    headers: dict[str, str] = {}

    for raw_name, raw_value in lines:
        name = raw_name.decode("latin-1")
        value = raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def client_address(headers: Mapping[str, str], peer: str, proxies: tuple[Network, ...]) -> str:
    """Return *peer* or, if it is among *proxies*, the last address of `X-Forwarded-For` that is not.

    If all of them are, that is the first one.
    """
    sent = _split_list(headers.get("x-forwarded-for"))
    while sent and is_within(peer, proxies):
        peer = sent.pop()[:MAX_ADDRESS]
    return peer


def without_prefix(path: str, root_path: str) -> str:
    """Return the part of *path* below the prefix *root_path*, which a proxy may have removed."""
    if not root_path or (path != root_path and not path.startswith(f"{root_path}/")):
        return path
    return path[len(root_path) :] or "/"


def _split_list(value: str | None) -> list[str]:
    """Split the *value* of a header with a list (RFC 9110, section 5.6.1.2); skip empty elements."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]


class OwnOrigins:
    """The hosts *names* and *allowed* of a server behind *proxies*, and the pages whose requests it answers.

    *scheme* is the one that the server itself speaks.

    Pages of other hosts among *allowed* or *pages*, where `*` means all, may send requests,
    too. IP addresses are own hosts: no other name can lead to them.
    """

    def __init__(
        self,
        names: Collection[str],
        allowed: Collection[str],
        proxies: tuple[Network, ...],
        pages: Collection[str] = (),
        scheme: str = "http",
    ) -> None:
        self._scheme = scheme
        self._own = [parse_host(name) for name in allowed]
        self._proxies = proxies
        self._pages = [*self._own, *(parse_host(page) for page in pages if page != "*")]
        self._all_pages = "*" in pages

        for name in names:
            with suppress(ValueError):  # an IPv6 address without brackets
                self._own.append(parse_host(name))

    def why_foreign(
        self, headers: Mapping[str, str], peer: str, *, is_link: bool = False
    ) -> str:
        """Say which host or page makes a request with *headers* from *peer* foreign; empty if none does.

        What a trusted proxy says about the host that the browser sees counts, too. With
        *is_link*, a link on another page may lead here; a browser sends no `Origin` for it.
        """
        # What the request is for; a proxy tells by which names clients reach it.
        hosts = [headers.get("host", "localhost")]  # HTTP/1.0 requests may have none
        schemes = [self._scheme]
        if is_within(peer, self._proxies):
            hosts += _split_list(headers.get("x-forwarded-host"))
            schemes += _split_list(headers.get("x-forwarded-proto"))

        for host in hosts:
            is_test = (host, peer) == (TEST_HOST, TEST_PEER)
            if not is_test and not is_among(host, self._own, or_address=True):
                return f"requests for {host[:100]!r}"

        # A page of another site sends its origin.
        origin = headers.get("origin")
        if origin is not None:
            if self._all_pages:
                return ""

            scheme, _, host = origin.partition("://")
            is_own_origin = scheme in schemes and host in hosts
            if not is_own_origin:
                return "" if is_among(origin, self._pages) else FOREIGN_PAGES

        # Newer browsers also tell whether the page is of this site.
        is_own_page = is_link or headers.get("sec-fetch-site") in {None, "none", "same-origin"}
        return "" if is_own_page else FOREIGN_PAGES


def is_among(sent: str, patterns: Collection[HostPattern], *, or_address: bool = False) -> bool:
    """Tell whether *sent*, the value of a header, is among *patterns* or, with *or_address*, an IP address.

    Clients send names in ASCII (RFC 5891, section 4), so none of them is encoded here.
    """
    if not sent.isascii():
        return False
    try:
        host = parse_host(sent)
    except ValueError:
        return False

    if any(pattern.matches(host) for pattern in patterns):
        return True
    return or_address and is_address(host.name)


def is_address(name: str) -> bool:
    """Tell whether *name* is an IP address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


# Of the connections; a client sends many requests
parse_address = functools.lru_cache(maxsize=1024)(ip_address)


def is_within(address: str, networks: tuple[Network, ...]) -> bool:
    """Tell whether the IP *address* of a connection is in one of *networks*."""
    try:
        # Without the zone of a link-local address
        parsed = parse_address(address.partition("%")[0])
    except ValueError:  # a connection without an address
        return False

    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return any((mapped or parsed) in network or parsed in network for network in networks)


def parse_network(text: str) -> Network:
    """Parse an address or network, such as `10.0.0.0/8`; raises `ValueError` if *text* is neither."""
    # The network of an address such as `10.1.2.3/8`
    return ip_network(text.strip(), strict=False)
