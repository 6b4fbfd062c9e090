"""Ed25519 keys and signatures in minisign's formats, so that its own program makes and checks them too.

The format is described on minisign's page (Frank Denis): every file is a comment and a line of base64. What
is signed is the BLAKE2b-512 of the message (algorithm `ED`); a second signature covers the first and the
trusted comment. Secret keys are unencrypted (`minisign -G -W` makes such): keep the file as a secret.
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
from sopdeploy.files import atomic_write

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY, PREHASHED, PLAIN_KDF, CHECKSUM = b"Ed", b"ED", b"\0\0", b"B2"
NO_KDF = bytes(32 + 8 + 8)  # salt and limits of the key derivation that is not used
NO_CHECKSUM = bytes(32)  # it is there to know a wrong password
LONGEST_FILE = 4096
COMMENT = "trusted comment: "


class SecretKey(NamedTuple):
    """Eight bytes that name the key, and its seed."""

    name: bytes
    seed: bytes

    def signer(self) -> "Ed25519PrivateKey":
        """Return the key that signs."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

        return Ed25519PrivateKey.from_private_bytes(self.seed)


class PublicKey(NamedTuple):
    """Eight bytes that name the key, and its point."""

    name: bytes
    point: bytes


def require_cryptography() -> None:
    """Raise `ConfigError` where the package that signs is not installed."""
    import_optional("cryptography", "cryptography", "sopdeploy[sign]", ConfigError, "signatures")


def sign_message(message: bytes, key: SecretKey, comment: str) -> str:
    """Return the signature file of *message*; *comment* is one line, and signed too."""
    signer = key.signer()
    first = signer.sign(hashlib.blake2b(message).digest())
    second = signer.sign(first + comment.encode())
    lines = [
        f"untrusted comment: signature from the key {key.name[::-1].hex().upper()}",
        encoded(PREHASHED + key.name + first),
        COMMENT + comment,
        encoded(second),
    ]
    return "\n".join(lines) + "\n"


def check_message(message: bytes, signature: str, key: PublicKey) -> None:
    """Raise `BundleError` unless *signature* is one of *message*, comment included, by *key*."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    lines = signature.splitlines()
    if len(lines) != 4 or not lines[2].startswith(COMMENT):
        raise BundleError("the signature is not a file of minisign's form")
    try:
        head, second = decoded(lines[1], 74), decoded(lines[3], 64)
    except ValueError as problem:
        raise BundleError(f"the signature is not a file of minisign's form ({problem})") from problem
    algorithm, name, first = head[:2], head[2:10], head[10:]
    if algorithm != PREHASHED:
        raise BundleError("the signature is not prehashed; sign with `sopdeploy sign` or `minisign -S`")
    if name != key.name:
        raise BundleError("the signature is of another key than the one given")
    point = Ed25519PublicKey.from_public_bytes(key.point)
    try:
        point.verify(first, hashlib.blake2b(message).digest())
        point.verify(second, first + lines[2].removeprefix(COMMENT).encode())
    except InvalidSignature as problem:
        raise BundleError("the signature does not fit: the bundle is not what was signed") from problem


def new_secret_key() -> SecretKey:
    """Return a new key."""
    return SecretKey(os.urandom(8), os.urandom(32))


def public_of(key: SecretKey) -> PublicKey:
    """Return the public part of *key*."""
    return PublicKey(key.name, key.signer().public_key().public_bytes_raw())


def secret_text(key: SecretKey) -> str:
    """Return the file of *key*."""
    pair = key.name + key.seed + public_of(key).point
    body = KEY + PLAIN_KDF + CHECKSUM + NO_KDF + pair + NO_CHECKSUM
    return f"untrusted comment: a secret key of sopdeploy: keep it\n{encoded(body)}\n"


def public_text(key: PublicKey) -> str:
    """Return the file of *key*."""
    named = key.name[::-1].hex().upper()
    return f"untrusted comment: minisign public key {named}\n{encoded(KEY + key.name + key.point)}\n"


def read_secret(path: Path) -> SecretKey:
    """Return the secret key at *path*; raises `ConfigError` where it is none, or has a password."""
    body = read_key(path, 158)
    if body[2:4] != PLAIN_KDF:
        raise ConfigError(f"{path}: has a password; make a key without one: `minisign -G -W`")
    key, point = SecretKey(body[54:62], body[62:94]), body[94:126]
    if public_of(key).point != point:
        raise ConfigError(f"{path}: damaged, its two halves do not belong together")
    return key


def read_public(path: Path) -> PublicKey:
    """Return the public key at *path*; raises `ConfigError` where it is none."""
    body = read_key(path, 42)
    return PublicKey(body[2:10], body[10:])


def read_key(path: Path, size: int) -> bytes:
    """Return the *size* bytes of the key file at *path*; raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            lines = file.read(LONGEST_FILE).decode().splitlines()
        body = decoded(lines[-1] if lines else "", size)
        if body[:2] != KEY:
            raise ValueError("of another algorithm")
    except OSError as problem:
        raise ConfigError(f"{path}: no key here ({problem.strerror})") from problem
    except ValueError as problem:
        raise ConfigError(f"{path}: not the file of such a key ({problem})") from problem
    return body


def encoded(body: bytes) -> str:
    """Return *body* as base64."""
    return base64.b64encode(body).decode()


def decoded(line: str, size: int) -> bytes:
    """Return the *size* bytes that *line* holds as base64; raises `ValueError`."""
    body = base64.b64decode(line, validate=True)
    if len(body) != size:
        raise ValueError(f"{len(body)} bytes where {size} belong")
    return body


SUFFIX = ".minisig"
PUBLIC = ".pub"


def signature_path(bundle: Path) -> Path:
    """Return where the signature of the bundle at *bundle* lies."""
    place = bundle.resolve()
    return place.with_name(place.name + SUFFIX)


def sign(bundle: Path, key: Path) -> Path:
    """Sign the bundle at *bundle* with the secret key at *key*; return the path of the signature.

    Raises `BundleError` for a damaged bundle, `ConfigError` for a key that is none.
    """
    require_cryptography()
    opened = open_bundle(bundle)
    manifest = opened.manifest
    text = sign_message(manifest.to_bytes(), read_secret(key), f"sopdeploy bundle {manifest.name}")
    path = signature_path(bundle)
    write_whole(path, text)
    return path


def make_key(path: Path) -> Path:
    """Write a new secret key to *path*, mode 0600, its public part to `path.pub`; return the latter's path.

    Raises `ConfigError` where a file is there already or cannot be written.
    """
    require_cryptography()
    key = new_secret_key()
    public = path.with_name(path.name + PUBLIC)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secret_text(key))
    except FileExistsError as problem:
        raise ConfigError(f"{path}: a file is there already; a key is never replaced") from problem
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from problem
    write_whole(public, public_text(public_of(key)))
    return public


def check_signed(manifest: Manifest, signature: Path, key: Path) -> None:
    """Raise `BundleError` unless the file *signature* signs *manifest* with the public key at *key*.

    Raises `ConfigError` where *key* is no public key.
    """
    require_cryptography()
    known = read_public(key)
    try:
        with signature.open("rb") as file:
            text = file.read(LONGEST_FILE).decode()
    except OSError as problem:
        raise BundleError(
            f"{manifest.name}: no signature at {signature.name} ({problem.strerror}); see `sopdeploy sign`"
        ) from problem
    except UnicodeDecodeError as problem:
        raise BundleError(f"{manifest.name}: the signature is not a file of minisign's form") from problem
    try:
        check_message(manifest.to_bytes(), text, known)
    except BundleError as problem:
        raise BundleError(f"{manifest.name}: {problem}") from problem


def write_whole(path: Path, text: str) -> None:
    """Let *path* hold *text*, in one step; raises `ConfigError`."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from problem
