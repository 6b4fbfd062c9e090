"""Check signatures of bundles, which the command `model_signing sign key` of the `model-signing` package writes.

A signature is a file beside the folder in the format of OpenSSF Model Signing: a Sigstore bundle
with a signed in-toto statement of the hashes of all files. It is compared with the hashes of the
bytes that were read, so that it covers exactly what runs. Keys are elliptic curve keys (P-256) in
PEM files.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sopdeploy.base.environment import import_optional
from sopdeploy.base.files import (
    MANIFEST,
    open_regular,
    read_at_most,
    read_file,
)
from sopdeploy.bundle.folder import SIGNATURE_SUFFIX, Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.errors import BundleError, ConfigError, MissingPackageError

MAX_FILE_BYTES = 1_000_000  # of a signature


def signature_path(bundle: Path) -> Path:
    """Return the absolute path of the signature file beside *bundle*, or beside what it links to."""
    resolved = bundle.resolve()
    return resolved.with_name(resolved.name + SIGNATURE_SUFFIX)


def read_signature(file: Path, bundle: object) -> bytes:
    """Read the signature *file* of *bundle*, which the error names; raises `BundleError`."""
    try:
        with open_regular(file) as stream:
            content = read_at_most(stream, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BundleError(
            f"{bundle}: no signature at {file.name} ({error.strerror}); "
            "write it with `model_signing sign key`"
        ) from error

    if len(content) > MAX_FILE_BYTES:
        raise BundleError(f"{file}: too large for a signature; get it again")
    return content


def check_signature(bundle: Bundle, signature: bytes, key: Path) -> None:
    """Verify that *signature* covers every file that was read of *bundle*, with the public key file *key*.

    Raises `BundleError` if it is not valid, and `ConfigError` if *key* is not a public key
    file.
    """
    verifying = _import("verifying")
    with _reading(key, "public elliptic curve key, as `openssl pkey -pubout` writes"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)

    sealed = SealedFile([signature])  # the package reads a file
    try:
        config.set_hashing_config(_HashesOf(bundle)).verify(bundle.path, Path(sealed.path))
    except Exception as error:  # the package raises several types for invalid signatures
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{bundle.path}: its signature is not valid ({reason}); get both again"
        ) from error


class _HashesOf:
    """What `model_signing` asks for the hashes of a folder; these are of the bytes that were read."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def add_ignored_paths(self, **_: object) -> None:
        """Ignore nothing: a signature covers all files that are used."""

    def hash(self, path: Path, **_: object) -> Any:
        """Return the `model_signing.manifest.Manifest` of the bytes that were read.

        Only the name of *path* is used: its files are not read again.
        """
        signing_manifest = _import("manifest")
        digest_type = _import("_hashing.hashing").Digest

        manifest = self._bundle.manifest
        hashes = {name: record.sha256 for name, record in manifest.files.items()}
        hashes[MANIFEST] = hashlib.sha256(manifest.to_bytes()).hexdigest()

        items = [
            signing_manifest.FileManifestItem(
                path=Path(name), digest=digest_type("sha256", bytes.fromhex(value))
            )
            for name, value in hashes.items()
        ]

        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        serialization_type = signing_manifest.SerializationType.from_args(serialization)
        return signing_manifest.Manifest(path.name, items, serialization_type)


def _import(module: str) -> Any:
    return import_optional(
        f"model_signing.{module}",
        "model-signing",
        ".[sign]",
        MissingPackageError,
        "signatures",
    )


@contextmanager
def _reading(key: Path, content: str) -> Iterator[None]:
    """Limit the size of the file *key*, and convert the errors of the block, which reads it.

    *content* names what the file should contain.
    """
    try:
        read_file(key, MAX_FILE_BYTES)  # the package reads a file of any size
        yield
    except OSError as error:
        raise ConfigError(
            f"{key}: key file cannot be read ({error.strerror}); check the path"
        ) from error
    except Exception as error:  # cryptography raises several types
        raise ConfigError(f"{key}: not a PEM file with a {content}") from error
