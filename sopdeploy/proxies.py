"""The proxy of a URL, from the variables of the environment that curl, pip and others read."""

import os
import re
import socket
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from sopdeploy.errors import ConfigError

HTTP_PROXIES = ("http", "https")  # the schemes of proxies that every client takes
# Also of the hub's
HTTPX_PROXIES = (*HTTP_PROXIES, *(("socks5", "socks5h") if find_spec("socksio") else ()))
S3_SCHEMES = ("s3", "s3a")


class Proxy(NamedTuple):
    """A proxy: its URL, which may contain a password, and the variable that names it."""

    url: str
    variable: str

    def __str__(self) -> str:
        """Describe the proxy for a message, without user and password."""
        return f"the proxy {without_password(self.url)} ({self.variable})"


def find_proxy(url: str, schemes: Collection[str] = HTTP_PROXIES) -> Proxy | None:
    """Return the proxy through which *url* is requested, or None for a direct connection.

    That is HTTP_PROXY or HTTPS_PROXY, else ALL_PROXY. NO_PROXY lists hosts, domains, addresses
    and networks without a proxy; requests to this machine never have one. Raises `ConfigError` if
    the variable has no URL with one of *schemes*.
    """
    target = urlsplit(url)
    host = (target.hostname or "").rstrip(".")
    configured = _configured_proxy(target, host)
    if configured is None:
        return None

    # The variable may name a host alone, as curl allows it.
    value = configured.url
    proxy = configured._replace(url=value if "://" in value else f"http://{value}")

    advice = f"write http://HOST:PORT, or add {host} to NO_PROXY"
    try:
        parts = urlsplit(proxy.url)
        if not parts.hostname or parts.port == 0 or not re.fullmatch("[!-~]+", proxy.url):
            raise ValueError("no host")
    except ValueError as error:  # also of an invalid port
        written = ascii(without_password(value))
        raise ConfigError(
            f"{proxy.variable}={written}: not the URL of a proxy; {advice}"
        ) from error
    if parts.scheme not in schemes:
        raise ConfigError(
            f"{describe_route(url, proxy)}: {parts.scheme}:// does not work here; {advice}"
        )

    return proxy


def _configured_proxy(target: SplitResult, host: str) -> Proxy | None:
    """Return the proxy for *target* on *host*, as its variable has it; None for a direct connection."""
    proxies = getproxies()
    kind = next((kind for kind in (target.scheme, "all") if proxies.get(kind)), None)
    if (
        kind is None
        or is_this_machine(host)
        or _is_excluded(host, target.port, proxies.get("no", ""))
    ):
        return None

    # In capitals or not, as the user has spelled it.
    names = (
        name
        for name in os.environ
        if name.lower() == f"{kind}_proxy" and os.environ[name] == proxies[kind]
    )
    return Proxy(proxies[kind], next(names, "settings of the system"))


def describe_route(url: str, proxy: Proxy | None) -> str:
    """Describe *url*, and the *proxy* on the way to it, for the start of a message."""
    return url if proxy is None else f"{url}, through {proxy}"


def store_options(url: str) -> dict[str, Any]:
    """Return the arguments with which fsspec requests *url* through the proxy of `find_proxy`.

    The clients of other stores read the variables themselves; that of S3 is told about a server
    on this machine. Raises `ConfigError` for a proxy that cannot be used.
    """
    scheme = url.partition("://")[0]
    if scheme == "hf":  # only the check: the hub's client reads the variables itself
        find_proxy(requested_url(url), HTTPX_PROXIES)
    if scheme in HTTP_PROXIES:
        proxy = find_proxy(url)
        return {} if proxy is None else {"proxy": proxy.url}

    is_local = scheme in S3_SCHEMES and is_this_machine(
        urlsplit(requested_url(url)).hostname or ""
    )
    return {"config_kwargs": {"proxies": {}}} if is_local else {}


def requested_url(url: str) -> str:
    """Return *url*, or for hf://... and s3://... the URL of the hub or of the object store."""
    scheme = url.partition("://")[0]
    if scheme == "hf":
        return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if scheme in S3_SCHEMES:
        variables = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
        return next(filter(None, map(os.environ.get, variables)), "https://s3.amazonaws.com")
    return url


def is_this_machine(host: str) -> bool:
    """Check for `localhost`, the name of this machine, or an address of a loopback; asks no name server."""
    host = host.rstrip(".").lower()
    if host == socket.gethostname().lower() or f".{host}".endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:  # another name
        return False
    return address.is_loopback or address.is_unspecified


def _is_excluded(host: str, port: int | None, no_proxy: str) -> bool:
    """Check whether the list *no_proxy* has *host*; what is neither a name nor a network excludes nothing."""
    host = host.lower()
    for entry in no_proxy.lower().replace(",", " ").split():
        with suppress(ValueError):  # one of them is a name
            if ip_address(host) in ip_network(entry.strip("[]"), strict=False):
                return True

        name = entry.rpartition("://")[2].lstrip("*.")
        ends = (host, f"{host}:{port}", f"[{host}]:{port}")
        if entry == "*" or (name and any(f".{end}".endswith(f".{name}") for end in ends)):
            return True
    return False


def without_password(url: str) -> str:
    """Remove user and password from *url*, for messages."""
    return re.sub(r"^([\w+.-]+://)?.*@", r"\1", url, flags=re.DOTALL)
