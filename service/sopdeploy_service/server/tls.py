"""HTTPS: the certificate of a server, and the handshakes of connections."""

import asyncio
import socket
import ssl
from collections.abc import Callable

from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import Settings

HANDSHAKE_SECONDS = 5.0  # also for the end of a connection
MAX_HANDSHAKES = 512  # at once; a further connection is closed


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of a server with *settings*, None for HTTP; raises `ConfigError`."""
    if settings.ssl_certfile is None:
        return None

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A key with a password fails, because OpenSSL would ask for it on a terminal.
        context.load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile, password=lambda: b""
        )
    except OSError as problem:  # `ssl.SSLError` is one
        reason = problem.strerror or type(problem).__name__
        raise ConfigError(
            f"ssl_certfile, ssl_keyfile: cannot be used ({reason}); give PEM files of a certificate and its "
            "private key without a password"
        ) from problem
    return context


class Acceptor:
    """Begins to serve accepted connections, with HTTPS if *settings* name a certificate; raises `ConfigError`."""

    def __init__(self, settings: Settings) -> None:
        self.context = tls_context(settings)
        self._num_handshakes = 0  # in progress

    async def accept(
        self, protocol: Callable[[], asyncio.Protocol], connection: socket.socket
    ) -> None:
        """Serve *connection* by a new *protocol*; raises `OSError` if its handshake fails.

        With HTTPS, this takes until the end of the handshake.
        """
        loop = asyncio.get_running_loop()
        if self.context is None:
            await loop.connect_accepted_socket(protocol, connection)
            return

        # Limit the handshakes, of which clients that say nothing have many.
        if self._num_handshakes >= MAX_HANDSHAKES:
            connection.close()
            return

        self._num_handshakes += 1
        try:
            await loop.connect_accepted_socket(
                protocol,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=HANDSHAKE_SECONDS,
            )
        finally:
            self._num_handshakes -= 1
