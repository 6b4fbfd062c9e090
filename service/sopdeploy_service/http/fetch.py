"""Fetch images from URLs of allowed hosts, protected against server-side request forgery.

No host is allowed by default. The scheme must be https unless configured otherwise. The host name is resolved
once, all its addresses must be public, and the connection uses that address, so a second DNS response has no
effect. Redirects are not followed; bytes and time are limited.
"""

import asyncio
import ssl
from dataclasses import replace
from functools import cache
from ipaddress import IPv6Address, ip_address, ip_network
from socket import SOCK_STREAM

import httpx

from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.settings import Settings

system_certificates = cache(ssl.create_default_context)

PORTS = {"https": 443, "http": 80}
PUBLIC_V6 = ip_network("2000::/3")  # excludes NAT64 and other prefixes that map IPv4 networks
HEADERS = {"User-Agent": "sopdeploy", "Accept": "image/*", "Accept-Encoding": "identity"}

NOT_ALLOWED = HttpError("url_not_allowed", 403, "url")
UNREACHABLE = HttpError("url_unreachable", 422, "url")
OFF = HttpError("url_input_off", 403, "this server does not fetch URLs; send the image itself")
_TIMEOUT = HttpError("url_timeout", 504, "fetching the image from the URL took too long")


async def fetch(url: str, settings: Settings) -> bytes:
    """Fetch the bytes of *url*.

    Raises `RejectedError`: 403 not allowed, 400 invalid URL, 413 too large, 422 not reachable, 504 timeout.
    """
    if not settings.url_hosts:
        raise RejectedError(OFF)
    target = check_url(url, settings)
    try:
        async with asyncio.timeout(settings.url_seconds):
            return await download(target, await public_address(target), settings.max_body_bytes)
    except TimeoutError as problem:
        raise RejectedError(_TIMEOUT) from problem


def check_url(url: str, settings: Settings) -> httpx.URL:
    """Parse *url* and check it against *settings*."""
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as problem:
        raise bad_request("bad_url", f"url: {problem}") from problem
    schemes = ("https", "http") if settings.url_plain_http else ("https",)
    if target.scheme not in schemes:
        raise _rejected(NOT_ALLOWED, f"the scheme must be {' or '.join(schemes)}")
    if target.userinfo:
        raise _rejected(NOT_ALLOWED, "user names and passwords are not supported")
    host = _host(target)
    names = {f"{host}:{target.port or PORTS[target.scheme]}"}
    if target.port in {None, PORTS[target.scheme]}:
        names.add(host)
    if names.isdisjoint(settings.url_hosts):
        raise _rejected(NOT_ALLOWED, f"{min(names)[:100]!r} is not among the allowed hosts of this server")
    return target


async def public_address(target: httpx.URL) -> str:
    """Choose the address to connect to; one private address among several forbids all."""
    host, port = _host(target), target.port or PORTS[target.scheme]
    try:
        addresses = await resolve(host, port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise _rejected(UNREACHABLE, f"{host} has no address")
    if not all(is_public(address) for address in addresses):
        raise _rejected(NOT_ALLOWED, f"{host} is not a public host")
    return addresses[0]


async def resolve(host: str, port: int) -> list[str]:
    """Look up the addresses of *host* with the system's resolver."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


def is_public(address: str) -> bool:
    """Check that *address*, and the IPv4 address it may contain, belong to the public internet."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address) and (parsed not in PUBLIC_V6 or parsed.sixtofour or parsed.teredo):
        return False
    return parsed.is_global and not parsed.is_multicast


async def download(target: httpx.URL, address: str, limit: int) -> bytes:
    """Download *target* from *address*; the TLS certificate must be valid for the host of *target*."""
    host = _host(target)
    headers = {**HEADERS, "Host": target.netloc.decode("ascii")}
    url, body = target.copy_with(host=address), bytearray()
    # trust_env=False: a proxy or .netrc of the environment would connect to another address.
    # `fetch` limits the time; httpx ends every wait after 5 seconds.
    client = httpx.AsyncClient(trust_env=False, verify=system_certificates(), timeout=None)  # noqa: S113
    try:
        async with (
            client,
            client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as response,
        ):
            if response.is_redirect:
                raise _rejected(NOT_ALLOWED, "redirects are not followed")
            if response.status_code != 200:
                raise _rejected(UNREACHABLE, f"{host} responded with status {response.status_code}")
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > limit:
                    message = f"url: the image is larger than {limit} bytes, the limit of this server"
                    raise RejectedError(HttpError("too_large", 413, message))
    except httpx.HTTPError as problem:
        raise _rejected(UNREACHABLE, f"{host} did not respond ({type(problem).__name__})") from problem
    return bytes(body)


def _host(target: httpx.URL) -> str:
    return target.raw_host.decode("ascii").lower()


def _rejected(kind: HttpError, reason: str) -> RejectedError:
    return RejectedError(replace(kind, message=f"url: {reason}"))
