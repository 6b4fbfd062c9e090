"""HTTPS with a certificate of the settings, in each way to run a server."""

import datetime
import re
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sopdeploy.errors import ConfigError
from sopdeploy_commands.health import health
from sopdeploy_service.server.tls import expiry, tls_context
from sopdeploy_service.settings import Settings, load_settings
from tests.support.children import EACH_WAY, START_SECONDS, WAYS, serving
from tests.support.raw import connect

HEALTH_CHECK = Path(__file__).parents[3] / "deploy" / "health.py"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the certificate of localhost and, behind it, its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )

    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_bytes(built.public_bytes(pem) + private)
    return file


@pytest.mark.parametrize("way", EACH_WAY)
def test_a_server_with_a_certificate_speaks_https(
    way, certificate, bundle_path, jpeg, monkeypatch
) -> None:
    options = (*WAYS[way], "--set", f"ssl_certfile={certificate}")
    with serving(str(bundle_path), *options) as child, ExitStack() as stack:
        assert child.base_url.scheme == "https"
        port = child.base_url.port

        # Others do not wait for clients that say nothing, and one that speaks HTTP gets no response.
        for _ in range(32):
            stack.enter_context(connect(child))
        context = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=f"https://localhost:{port}", verify=context) as client:
            expires = x509.load_pem_x509_certificate(
                certificate.read_bytes()
            ).not_valid_after_utc
            shown = r"^sopdeploy_certificate_expiry_timestamp_seconds(?:{.*})? (\S+)"
            seen = {*map(float, re.findall(shown, client.get("/metrics").text, re.M))}
            assert seen - {0.0} == {expires.timestamp()}

            reply = client.post("/v1/classify", content=jpeg)
            assert (reply.status_code, reply.http_version) == (200, "HTTP/1.1")
            origin = {"Origin": f"https://localhost:{port}"}
            assert client.post("/v1/classify", content=jpeg, headers=origin).status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://localhost:{port}/livez")

            monkeypatch.setenv("SOPDEPLOY_PORT", str(port))
            monkeypatch.setenv("SOPDEPLOY_SSL_CERTFILE", str(certificate))
            assert health() == 0
            check = [sys.executable, "-I", "-S", str(HEALTH_CHECK)]  # that of the images
            assert subprocess.run(check, check=False).returncode == 0

            # The kept connection gets its last response.
            child.child.terminate()
            assert child.child.wait(START_SECONDS) == 0


def test_the_key_may_be_in_a_file_of_its_own(tmp_path, certificate) -> None:
    found = certificate.read_bytes()
    begin = found.index(b"-----BEGIN PRIVATE")
    (tmp_path / "tls.crt").write_bytes(found[:begin])
    (tmp_path / "tls.key").write_bytes(found[begin:])

    files = {"ssl_certfile": tmp_path / "tls.crt", "ssl_keyfile": tmp_path / "tls.key"}
    assert tls_context(Settings(**files)) is not None
    (tmp_path / "key first.pem").write_bytes(found[begin:] + found[:begin])
    assert expiry(tmp_path / "key first.pem") == expiry(tmp_path / "tls.crt")

    with pytest.raises(ConfigError, match=r"^ssl_certfile"):
        tls_context(Settings(ssl_certfile=tmp_path / "tls.crt"))
    with pytest.raises(ConfigError, match="ssl_keyfile"):
        load_settings(ssl_keyfile=tmp_path / "tls.key")


@pytest.mark.parametrize("year", [2031, 2049, 2050, 9999])
def test_the_end_of_a_certificate_is_read_in_both_forms(tmp_path, year) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    end = datetime.datetime(year, 12, 31, 23, 59, 58, tzinfo=datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * 64)])
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "tls.crt").write_bytes(built.public_bytes(serialization.Encoding.PEM))

    assert expiry(tmp_path / "tls.crt") == end.timestamp()


@pytest.mark.parametrize("name", ["missing.pem", "text.pem", "locked.pem"])
def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path, certificate, name) -> None:
    (tmp_path / "text.pem").write_text("text")
    found = certificate.read_bytes()
    begin = found.index(b"-----BEGIN PRIVATE")
    key = serialization.load_pem_private_key(found[begin:], None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "locked.pem").write_bytes(found[:begin] + locked)

    with pytest.raises(ConfigError, match=r"^ssl_certfile") as caught:
        tls_context(Settings(ssl_certfile=tmp_path / name))
    assert "\n" not in str(caught.value)
