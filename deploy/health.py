"""The health check of the images: exit with 0 if the server of this container is ready, else with 1.

It does what `sopdeploy health` does, with the settings of the environment and of the file that
SOPDEPLOY_CONFIG names. It runs every ten seconds, so it imports only what it needs: with the
package, a check would take ten times as long.
"""

import os
import socket
import sys

TIMEOUT = 3  # seconds for each step
# Addresses on which a server listens, and where this container reaches it
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}  # noqa: S104
REQUEST = b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n"


def main() -> int:
    """Request `/readyz`; return the exit code."""
    settings = read_settings()
    host = settings.get("host", "127.0.0.1")
    address = REACHED_AT.get(host, host), int(settings.get("port", 8000))

    try:
        with socket.create_connection(address, TIMEOUT) as connection:
            if settings.get("ssl_certfile"):
                connection = encrypted(connection)
            connection.sendall(REQUEST)
            status_line = connection.makefile("rb").readline()
    except OSError as error:
        sys.stderr.write(f"not ready: {error}\n")
        return 1

    if b" 200 " not in status_line:
        sys.stderr.write(f"not ready: {status_line.decode(errors='replace')}")
        return 1
    return 0


def read_settings() -> dict[str, str]:
    """Return the settings of the variable PORT, the file and the environment, the last one first."""
    settings: dict[str, str] = {}
    if os.environ.get("PORT", "").isdecimal():
        settings["port"] = os.environ["PORT"]

    if file := os.environ.get("SOPDEPLOY_CONFIG"):
        import tomllib  # noqa: PLC0415 - takes time

        with open(file, "rb") as stream:  # noqa: PTH123 - pathlib takes longer to import
            settings |= tomllib.load(stream)

    for name in ("host", "port", "ssl_certfile"):
        if text := os.environ.get(f"SOPDEPLOY_{name.upper()}"):
            settings[name] = text
    return settings


def encrypted(connection: socket.socket) -> socket.socket:
    """Begin HTTPS; any certificate will do, because it has the name by which clients reach the server."""
    import ssl  # noqa: PLC0415 - takes time

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


if __name__ == "__main__":
    sys.exit(main())
