"""Ed25519 keys and signatures in the file formats of minisign.

Format: https://jedisct1.github.io/minisign (Frank Denis). Each file has a comment line and a base64 line. The
first signature covers the BLAKE2b-512 hash of the message (algorithm `ED`), the second one covers the first
signature and the trusted comment. Secret keys are not encrypted, like those of `minisign -G -W`.
"""

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import atomic_write, writing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY, PREHASHED, NO_KDF, CHECKSUM = b"Ed", b"ED", b"\0\0", b"B2"
KDF_PARAMETERS = bytes(32 + 8 + 8)  # salt and limits of the key derivation, unused without a password
KEY_CHECKSUM = bytes(32)  # detects a wrong password, unused without one
MAX_FILE_BYTES = 4096
COMMENT = "trusted comment: "
INVALID = "the signature is not a file in minisign's format"
SUFFIX = ".minisig"
PUBLIC_SUFFIX = ".pub"


class SecretKey(NamedTuple):
    """The 8-byte key id and the 32-byte seed."""

    name: bytes
    seed: bytes

    def signer(self) -> "Ed25519PrivateKey":
        """Build the private key of the cryptography package."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

        return Ed25519PrivateKey.from_private_bytes(self.seed)

    def public(self) -> "PublicKey":
        """Derive the public key."""
        return PublicKey(self.name, self.signer().public_key().public_bytes_raw())


class PublicKey(NamedTuple):
    """The 8-byte key id and the 32-byte curve point."""

    name: bytes
    point: bytes


def require_cryptography() -> None:
    """Raise `ConfigError` with an install hint if the cryptography package is missing."""
    import_optional("cryptography", "cryptography", "sopdeploy[sign]", ConfigError, "signatures")


def sign_message(message: bytes, key: SecretKey, comment: str) -> str:
    """Create the signature file of *message*; the one-line *comment* is signed too."""
    signer = key.signer()
    first = signer.sign(hashlib.blake2b(message).digest())
    second = signer.sign(first + comment.encode())
    lines = [
        f"untrusted comment: signature from the key {key.name[::-1].hex().upper()}",
        _encode(PREHASHED + key.name + first),
        COMMENT + comment,
        _encode(second),
    ]
    return "\n".join(lines) + "\n"


def check_message(message: bytes, signature: str, key: PublicKey) -> None:
    """Raise `BundleError` unless *signature* is valid for *message*, its comment and *key*."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    lines = signature.splitlines()
    if len(lines) != 4 or not lines[2].startswith(COMMENT):
        raise BundleError(INVALID)
    try:
        head, second = _decode(lines[1], 74), _decode(lines[3], 64)
    except ValueError as error:
        raise BundleError(f"{INVALID} ({error})") from error
    algorithm, name, first = head[:2], head[2:10], head[10:]
    if algorithm != PREHASHED:
        raise BundleError("the signature is not prehashed; sign with `sopdeploy sign` or `minisign -S`")
    if name != key.name:
        raise BundleError("the signature was made with another key; ask its author for the key")
    public = Ed25519PublicKey.from_public_bytes(key.point)
    try:
        public.verify(first, hashlib.blake2b(message).digest())
        public.verify(second, first + lines[2].removeprefix(COMMENT).encode())
    except InvalidSignature as error:
        raise BundleError(
            "the signature does not match: bundle or signature changed after signing; get both again"
        ) from error


def read_secret(path: Path) -> SecretKey:
    """Read a secret key file; raise `ConfigError` if it is invalid or has a password."""
    body = _read_key(path, 158)
    if body[2:4] != NO_KDF:
        raise ConfigError(f"{path}: has a password; create a key without one: `minisign -G -W`")
    key, point = SecretKey(body[54:62], body[62:94]), body[94:126]
    if key.public().point != point:
        raise ConfigError(f"{path}: damaged, secret and public part do not match; create a new key")
    return key


def read_public(path: Path) -> PublicKey:
    """Read a public key file; raise `ConfigError` if it is invalid."""
    body = _read_key(path, 42)
    return PublicKey(body[2:10], body[10:])


def signature_path(bundle: Path) -> Path:
    """Return the path of the signature file beside *bundle*."""
    resolved = bundle.resolve()
    return resolved.with_name(resolved.name + SUFFIX)


def sign(bundle: Path, key: Path) -> Path:
    """Sign the bundle at *bundle* with the secret key file *key* and return the signature path.

    Raises `BundleError` for a damaged bundle and `ConfigError` for an invalid key.
    """
    require_cryptography()
    manifest = open_bundle(bundle).manifest
    text = sign_message(manifest.to_bytes(), read_secret(key), f"sopdeploy bundle {manifest.name}")
    path = signature_path(bundle)
    with writing(path, ConfigError), atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def make_key(path: Path) -> Path:
    """Write a new secret key to *path* (mode 0600) and its public key to `path.pub`; return the latter.

    Raises `ConfigError` if one of the two exists or cannot be written.
    """
    require_cryptography()
    public, replaced = Path(f"{path}{PUBLIC_SUFFIX}"), "a key is never replaced; choose another path"
    if os.path.lexists(public):  # its secret key may have been moved elsewhere
        raise ConfigError(f"{public}: exists already, {replaced}")
    key = SecretKey(os.urandom(8), os.urandom(32))
    name, point = key.public()
    body = KEY + NO_KDF + CHECKSUM + KDF_PARAMETERS + name + key.seed + point + KEY_CHECKSUM
    with writing(path, ConfigError):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ConfigError(f"{path}: exists already, {replaced}") from error
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"untrusted comment: secret key of sopdeploy, do not share\n{_encode(body)}\n")
    comment = f"untrusted comment: minisign public key {name[::-1].hex().upper()}"
    with writing(public, ConfigError), atomic_write(public) as partial:
        partial.write_text(f"{comment}\n{_encode(KEY + name + point)}\n", encoding="utf-8")
    return public


def check_signed(manifest: Manifest, signature: Path, key: Path) -> None:
    """Raise `BundleError` unless the file *signature* is valid for *manifest* and the public key file *key*.

    Raises `ConfigError` if *key* is not a public key file.
    """
    require_cryptography()
    public = read_public(key)
    try:
        with signature.open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode()
        check_message(manifest.to_bytes(), text, public)
    except OSError as error:
        raise BundleError(
            f"{manifest.name}: no signature at {signature.name} ({error.strerror}); see `sopdeploy sign`"
        ) from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{manifest.name}: {INVALID}") from error
    except BundleError as error:
        raise BundleError(f"{manifest.name}: {error}") from error


def _read_key(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_FILE_BYTES).decode().splitlines()
        body = _decode(lines[-1] if lines else "", size)
        if body[:2] != KEY:
            raise ValueError("unsupported algorithm")
    except OSError as error:
        raise ConfigError(f"{path}: key file cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ConfigError(
            f"{path}: not a minisign key file of the required kind ({error}); sign with the secret key and "
            f"verify with the public one, {PUBLIC_SUFFIX}"
        ) from error
    return body


def _encode(body: bytes) -> str:
    return base64.b64encode(body).decode()


def _decode(line: str, size: int) -> bytes:
    body = base64.b64decode(line, validate=True)
    if len(body) != size:
        raise ValueError(f"{len(body)} bytes instead of {size}")
    return body
