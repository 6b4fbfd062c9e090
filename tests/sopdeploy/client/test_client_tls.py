"""Encrypted connections: private authorities, and names that a certificate does not have."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sopdeploy.client import Client
from sopdeploy.errors import UnreachableError
from tests.support.stub_server import reply

pytestmark = pytest.mark.usefixtures("client_kind")  # with both clients


def write_certificate(path: Path) -> Path:
    """Write a certificate for localhost, which is its own authority, and its key to *path*."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Private authority")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )

    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@contextmanager
def tls_server(certificate: Path) -> Iterator[int]:
    """Answer every request by TLS; yield the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the block ends
                return
            with suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
                received = b""
                while not received.endswith(b"\r\n\r\nx"):
                    received += secure.recv(1 << 16)
                secure.sendall(reply(b'{"classes":[]}'))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_certificate_of_a_private_authority_is_refused_until_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = write_certificate(tmp_path / "authority.pem")

    with tls_server(certificate) as port:
        url = f"https://localhost:{port}"
        with Client(url, timeout=600) as client, pytest.raises(UnreachableError):
            client.classify(b"x")

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(url) as client:
            assert client.classify(b"x").classes == ()

        with (
            Client(f"https://127.0.0.1:{port}", timeout=600) as client,
            pytest.raises(UnreachableError),
        ):
            client.classify(b"x")


def test_a_context_of_the_user_is_used(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "authority.pem")
    trusting = ssl.create_default_context(cafile=certificate)

    with (
        tls_server(certificate) as port,
        Client(f"https://localhost:{port}", verify=trusting) as client,
    ):
        assert client.classify(b"x").classes == ()
