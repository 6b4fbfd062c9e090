"""Signatures of bundles in the format of OpenSSF Model Signing, by the `model-signing` package.

A signature is a Sigstore bundle beside the folder: a signed in-toto statement with the hashes of all files.
Keys are elliptic curve keys (P-256) in PEM files. `model_signing verify key` accepts signatures of `sign`,
and `check_signature` accepts those of `model_signing sign key`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sopdeploy.bundle.folder import SIGNATURE_SUFFIX, open_bundle
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError, MissingPackageError
from sopdeploy.files import atomic_write, read_file, writing

MAX_FILE_BYTES = 1_000_000  # of a signature


def signature_path(bundle: Path) -> Path:
    """Return the path of the signature file beside *bundle*."""
    resolved = bundle.resolve()
    return resolved.with_name(resolved.name + SIGNATURE_SUFFIX)


def sign(bundle: Path, key: Path) -> Path:
    """Sign the files of the bundle at *bundle* with the private key file *key*; return the signature path.

    Raises `BundleError` for a damaged bundle and `ConfigError` for an invalid key.
    """
    signing = _import("signing")
    folder = open_bundle(bundle).path.resolve()
    path = signature_path(bundle)
    with _reading(key, "private elliptic curve key, as `openssl genpkey -algorithm EC` writes"):
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    with writing(path), atomic_write(path) as partial:
        config.sign(folder, partial)
    return path


def check_signature(bundle: Path, signature: Path, key: Path) -> None:
    """Verify *signature* of all files in *bundle* with the public key file *key*.

    Raises `BundleError` if it is not valid, and `ConfigError` if *key* is not a public key file.
    """
    verifying = _import("verifying")
    with _reading(key, "public elliptic curve key, as `openssl pkey -pubout` writes"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    try:
        if signature.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{signature}: too large for a signature; get it again")
        config.verify(bundle.resolve(), signature)
    except OSError as error:
        raise BundleError(
            f"{bundle}: no signature at {signature.name} ({error.strerror}); see `sopdeploy sign`"
        ) from error
    except BundleError:
        raise
    except Exception as error:  # the package raises several types for invalid signatures
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{bundle}: the signature {signature.name} is not valid ({reason}); get both again"
        ) from error


def _import(module: str) -> Any:
    return import_optional(
        f"model_signing.{module}", "model-signing", "sopdeploy[sign]", MissingPackageError, "signatures"
    )


@contextmanager
def _reading(key: Path, content: str) -> Iterator[None]:
    """Convert the error of a block that reads *key* to a `ConfigError`; the file should hold *content*."""
    try:
        read_file(key, MAX_FILE_BYTES)  # the package reads a file of any size
        yield
    except OSError as error:
        raise ConfigError(f"{key}: key file cannot be read ({error.strerror}); check the path") from error
    except Exception as error:  # cryptography raises several types
        raise ConfigError(f"{key}: not a PEM file with a {content}") from error
