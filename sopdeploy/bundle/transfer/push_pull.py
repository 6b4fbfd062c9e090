"""Push a bundle somewhere, pull it from there; what arrives is checked before it has a bundle's name."""

import hmac
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sopdeploy.bundle.folder import Bundle, digest, open_bundle, publish, staging
from sopdeploy.bundle.signing import LONGEST_FILE, SUFFIX, check_signed, signature_path
from sopdeploy.bundle.transfer.archive import archived_manifest, unpack, write_archive
from sopdeploy.bundle.transfer.storage import OCI, get, pull_artifact, push_artifact, put
from sopdeploy.errors import BundleError, ConfigError

ARCHIVE = ".tar"
MAX_BYTES = 8_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """Where an archive is now, its size and sha256, and whether a signature went with it."""

    place: str
    bytes: int
    sha256: str
    signed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """The bundle that was pulled, and whether its signature was checked."""

    path: Path
    sha256: str
    verified: bool


def push(path: Path, place: str) -> Pushed:
    """Pack the bundle at *path* and put it to *place*: a folder, a URL that fsspec knows, or `oci://...`.

    Its signature, where one lies beside it, goes first: a reader who sees the archive finds it. Raises
    `BundleError` for a damaged bundle or a place that takes nothing.
    """
    bundle = open_bundle(path)
    signature = signature_path(path) if signature_path(path).is_file() else None
    with tempfile.TemporaryDirectory(prefix="sopdeploy-") as folder:
        archive = Path(folder) / f"bundle{ARCHIVE}"
        with archive.open("wb") as file:
            write_archive(bundle, file)
        return Pushed(
            place=deliver(bundle, archive, signature, place),
            bytes=archive.stat().st_size,
            sha256=digest(archive),
            signed=signature is not None,
        )


def deliver(bundle: Bundle, archive: Path, signature: Path | None, place: str) -> str:
    """Put *archive* and *signature* of *bundle* to *place*; return where the archive is."""
    if place.startswith(OCI):
        return push_artifact(archive, signature, place, bundle.manifest.id)
    name = bundle.manifest.name + ARCHIVE
    if signature is not None:
        put(signature, place, name + SUFFIX)
    return put(archive, place, name)


def pull(
    source: str,
    destination: Path,
    *,
    sha256: str | None = None,
    verify_key: Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> Pulled:
    """Take the archive at *source* and write its bundle into the folder *destination*.

    In this order: at most *max_bytes* are fetched into a hidden folder; their *sha256*, where given, must
    fit; the manifest, which comes first, must be signed by *verify_key*, where given; only then files are
    unpacked, all hashes are compared, and the bundle gets its name. Raises `BundleError`.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(f"--sha256 {sha256}: say the 64 hexadecimal digits that `push` printed")
    with staging(destination) as fetched, staging(destination) as folder:
        archive = fetched / plain_name(source)
        signature = archive.with_name(archive.name + SUFFIX)
        fetch(source, archive, signature, max_bytes, signed=verify_key is not None)
        found = digest(archive)
        if sha256 is not None and not hmac.compare_digest(found, sha256):
            raise BundleError(f"{source}: its sha256 is {found}, not the one given")
        manifest = archived_manifest(archive)
        if verify_key is not None:
            check_signed(manifest, signature, verify_key)
        unpack(archive, manifest, folder)
        check_unpacked(folder, source)
        path = publish(folder, manifest, destination)
        if signature.is_file():
            signature.replace(signature_path(path))
    return Pulled(path=path, sha256=found, verified=verify_key is not None)


def plain_name(source: str) -> str:
    """Return the last part of *source* as a file may be called; errors name it."""
    return re.sub(r"[^\w.-]", "_", source.rpartition("/")[2])[-100:] or "archive"


def check_unpacked(folder: Path, source: str) -> None:
    """Open the bundle in *folder*; an error speaks of *source*, because nobody knows the hidden folder."""
    try:
        open_bundle(folder)
    except BundleError as problem:
        raise BundleError(str(problem).replace(str(folder), source)) from problem


def fetch(source: str, archive: Path, signature: Path, limit: int, *, signed: bool) -> None:
    """Fetch the *archive* at *source*, and its *signature* where it must be *signed* or comes along."""
    if source.startswith(OCI):
        pull_artifact(source, archive, signature, limit)
        return
    get(source, archive, limit)
    if signed:
        try:
            get(source + SUFFIX, signature, LONGEST_FILE)
        except BundleError as problem:
            raise BundleError(
                f"{source}: no signature beside it ({problem}); see `sopdeploy sign`"
            ) from problem
