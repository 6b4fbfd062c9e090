"""HTTPS: the certificate of a server, and the handshakes of connections."""

import asyncio
import socket
import ssl
from _ssl import _test_decode_cert  # type: ignore[attr-defined]  # `ssl` needs a connection for it
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import Settings

HANDSHAKE_SECONDS = 5.0  # also for the end of a connection


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of a server with *settings*, None for HTTP; raises `ConfigError`."""
    if settings.ssl_certfile is None:
        return None

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A key with a password fails, because OpenSSL would ask for it on a terminal.
        context.load_cert_chain(settings.ssl_certfile, password=lambda: b"")
    except OSError as problem:  # `ssl.SSLError` is one
        raise ConfigError(f"ssl_certfile: {problem}") from problem
    return context


def expiry(certificate: Path) -> float:
    """Return the time, in seconds since 1970, at which the *certificate* that `tls_context` has read expires."""
    return float(ssl.cert_time_to_seconds(_test_decode_cert(certificate)["notAfter"]))


async def accept(
    protocol: Callable[[], asyncio.Protocol],
    connection: socket.socket,
    context: ssl.SSLContext | None,
) -> None:
    """Serve the accepted *connection* by a new *protocol*; raises `OSError` if its handshake fails.

    With HTTPS, this takes until the end of the handshake.
    """
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(protocol, connection, **handshake(context))


def handshake(context: ssl.SSLContext | None) -> dict[str, Any]:
    """Return the arguments for a connection or a port of HTTPS with *context*; none for HTTP."""
    if context is None:
        return {}
    return {
        "ssl": context,
        "ssl_handshake_timeout": HANDSHAKE_SECONDS,
        "ssl_shutdown_timeout": HANDSHAKE_SECONDS,
    }
