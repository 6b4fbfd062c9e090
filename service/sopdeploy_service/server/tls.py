"""HTTPS: the certificate of a server, and the times of its connections."""

import base64
import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sopdeploy.base.files import MAX_TEXT_BYTES, read_file
from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import Settings

# Arguments of asyncio for each connection of HTTPS, in seconds
TLS_LIMITS = {"ssl_handshake_timeout": 5.0, "ssl_shutdown_timeout": 5.0}
PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", re.DOTALL)
# Of a certificate (RFC 5280, section 4.1), counted without the version, which may be left out
VERSION_TAG = 0xA0
VALIDITY = 3
MAX_FIELDS = 100
LONG_YEAR_TAG = 24  # of a time whose year has four digits


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
        names = "ssl_certfile" if settings.ssl_keyfile is None else "ssl_certfile, ssl_keyfile"
        raise ConfigError(f"{names}: {problem}") from problem
    return context


def expiry(file: Path) -> float:
    """Return when the first certificate of *file*, which `tls_context` has read, expires, in seconds since 1970.

    Python's `ssl` tells this only of a certificate that a connection has accepted, and the package
    `cryptography` is not required.
    """
    pem = PEM.search(read_file(file, MAX_TEXT_BYTES))
    if pem is None:
        raise ConfigError(f"{file}: has no certificate in PEM")

    # A certificate is a list of its content, the algorithm and the signature.
    [(_, certificate)] = read_der(base64.b64decode(pem[1]), limit=1)
    [(_, content)] = read_der(certificate, limit=1)
    fields = [field for tag, field in read_der(content) if tag != VERSION_TAG]

    _, (tag, text) = read_der(fields[VALIDITY])  # not before, not after
    form = "%Y%m%d%H%M%SZ" if tag == LONG_YEAR_TAG else "%y%m%d%H%M%SZ"
    return datetime.strptime(text.decode(), form).replace(tzinfo=UTC).timestamp()


def read_der(data: bytes, limit: int = MAX_FIELDS) -> Iterator[tuple[int, bytes]]:
    """Yield the tags and contents of the first *limit* elements of *data* in DER (X.690, section 8.1)."""
    begin = 0
    while begin < len(data) and limit > 0:
        tag, length = data[begin], data[begin + 1]
        begin += 2
        if length & 0x80:  # the number of the bytes that tell the length
            end = begin + (length & 0x7F)
            length = int.from_bytes(data[begin:end])
            begin = end

        yield tag, data[begin : begin + length]
        begin += length
        limit -= 1
