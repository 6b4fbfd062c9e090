"""The image behind a URL, fetched only from hosts that the operator listed, and never from inside.

A server that fetches what strangers name is a door into its own network. So: off unless hosts are listed;
https unless said otherwise; the name is resolved once, every address it has must be public, and the
connection goes to that very address (a second answer of the DNS is never asked for); no redirect is
followed; bytes and time are limited. What comes back is judged by the decoder like any other image.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from ipaddress import IPv6Address, ip_address, ip_network
from socket import SOCK_STREAM

import httpx

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.strict_json import bad_request
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.settings import Settings

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

PORTS = {"https": 443, "http": 80}
PUBLIC_V6 = ip_network("2000::/3")  # without NAT64 and others that lead into IPv4 networks
HEADERS = {"User-Agent": "sopdeploy", "Accept": "image/*", "Accept-Encoding": "identity"}

OFF = Rejection("url_input_off", 403, "this server fetches no URLs; send the image itself")
TIMEOUT = Rejection("url_timeout", 504, "the image did not arrive from the URL in time")


async def fetch(
    url: str,
    settings: Settings,
    *,
    resolve: Resolve | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bytes:
    """Return the bytes behind *url*.

    *resolve* gives the addresses of a host, *transport* carries the request; the defaults are the system's.
    Raises `RefusedError`: 403 for what is not allowed, 400 for no URL, 413, 422 where nothing came, 504.
    """
    if not settings.url_hosts:
        raise RejectedError(OFF)
    target = allowed(url, settings)
    try:
        async with asyncio.timeout(settings.url_seconds):
            address = await public_address(target, resolve or system_addresses)
            return await download(target, address, settings.max_body_bytes, transport)
    except TimeoutError as problem:
        raise RejectedError(TIMEOUT) from problem


def allowed(url: str, settings: Settings) -> httpx.URL:
    """Return *url* taken apart, where its scheme, host and port are allowed."""
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as problem:
        raise bad_request("bad_url", f"url: {problem}") from problem
    schemes = ("https", "http") if settings.url_plain_http else ("https",)
    if target.scheme not in schemes:
        raise forbidden(f"the scheme must be {' or '.join(schemes)}")
    if target.userinfo:
        raise forbidden("no user name or password in it")
    host = host_of(target)
    place = host if port_of(target) == PORTS[target.scheme] else f"{host}:{port_of(target)}"
    if place not in settings.url_hosts:
        raise forbidden(f"{place[:100]!r} is not among the hosts this server fetches from")
    return target


def host_of(target: httpx.URL) -> str:
    """Return the host as it goes over the wire, in small letters."""
    return target.raw_host.decode("ascii").lower()


def port_of(target: httpx.URL) -> int:
    """Return the port, which the scheme has where the URL names none."""
    return target.port or PORTS[target.scheme]


async def system_addresses(host: str, port: int) -> Sequence[str]:
    """Return the addresses that the system's resolver gives for *host*."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def public_address(target: httpx.URL, resolve: Resolve) -> str:
    """Return the address to connect to; one that is not public among several forbids them all."""
    host = host_of(target)
    try:
        addresses = await resolve(host, port_of(target))
    except (OSError, UnicodeError) as problem:
        raise nothing(f"{host} has no address") from problem
    if not addresses:
        raise nothing(f"{host} has no address")
    if not all(is_public(address) for address in addresses):
        raise forbidden(f"{host} is not a public host")
    return addresses[0]


def is_public(address: str) -> bool:
    """Say whether *address* lies in the public internet, itself and whatever it may be mapped to."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and (found not in PUBLIC_V6 or found.sixtofour or found.teredo):
        return False
    return found.is_global and not found.is_multicast


async def download(
    target: httpx.URL, address: str, limit: int, transport: httpx.AsyncBaseTransport | None
) -> bytes:
    """Return the body at *target*, asked of *address*; the certificate must still be the host's."""
    pinned = target.copy_with(host=address)
    headers = {**HEADERS, "Host": target.netloc.decode("ascii")}
    body = bytearray()
    try:
        async with (
            # no proxy and no .netrc of the environment: they would connect to somewhere else
            httpx.AsyncClient(transport=transport, trust_env=False, verify=certificates()) as client,
            client.stream(
                "GET", pinned, headers=headers, extensions={"sni_hostname": host_of(target)}
            ) as reply,
        ):
            if reply.is_redirect:
                raise forbidden("it redirects, and redirects are not followed")
            if reply.status_code != 200:
                raise nothing(f"{host_of(target)} answers {reply.status_code}")
            async for piece in reply.aiter_raw():
                body += piece
                if len(body) > limit:
                    raise RejectedError(too_large_error(limit))
    except httpx.HTTPError as problem:
        raise nothing(f"{host_of(target)} gives no answer ({type(problem).__name__})") from problem
    return bytes(body)


@cache
def certificates() -> ssl.SSLContext:
    """Return the system's certificates, read once."""
    return ssl.create_default_context()


def forbidden(why: str) -> RejectedError:
    """Return the error of a URL that this server does not fetch."""
    return RejectedError(Rejection("url_not_allowed", 403, f"url: {why}"))


def nothing(why: str) -> RejectedError:
    """Return the error of a URL behind which there is no image to be had."""
    return RejectedError(Rejection("url_unreachable", 422, f"url: {why}"))


def too_large_error(limit: int) -> Rejection:
    """Return the refusal of an image behind a URL that is larger than *limit* bytes."""
    return Rejection(
        "too_large", 413, f"url: the image is larger than {limit} bytes, the limit of this server"
    )
