"""Who made this bundle: a signature beside it, over its manifest and through it over every file.

A bundle never changes, so the signature is no part of it: `NAME.minisig` lies beside the folder `NAME`, and
`minisign -Vm NAME/manifest.json -x NAME.minisig -p KEY` checks it without us.
"""

import os
from pathlib import Path

from sopdeploy.bundle import open_bundle
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.manifest import Manifest
from sopdeploy.travel.minisign import (
    LONGEST_FILE,
    check_message,
    new_secret_key,
    public_of,
    public_text,
    read_public,
    read_secret,
    require_cryptography,
    secret_text,
    sign_message,
)
from sopdeploy.whole import whole

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
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from problem
