"""Push bundles to folders, object stores and OCI registries, and pull them back, with all checks."""

import hmac
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sopdeploy.bundle.archive import archived_manifest, unpack, write_archive
from sopdeploy.bundle.folder import open_bundle, publish, staging
from sopdeploy.bundle.signing import MAX_FILE_BYTES, SUFFIX, check_signature, signature_path
from sopdeploy.bundle.storage import OCI, get, pull_artifact, push_artifact, put
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import sha256 as sha256_of

ARCHIVE_SUFFIX = ".tar"
_MAX_BYTES = 8_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """URL or path, size and sha256 of a pushed archive, and whether a signature was pushed too."""

    url: str
    bytes: int
    sha256: str
    signed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """Path of a pulled bundle, sha256 of its archive, and whether its signature was checked."""

    path: Path
    sha256: str
    verified: bool


def push(path: Path, destination: str) -> Pushed:
    """Pack the bundle at *path* and upload it.

    *destination* is a folder, an fsspec URL such as `s3://...` and `hf://...`, or `oci://...`. A signature
    beside the bundle is uploaded first, or in the same artifact, so a reader who sees the archive also finds
    it. Raises `BundleError` for a damaged bundle or a failed upload.
    """
    bundle = open_bundle(path)
    signature = signature_path(path) if signature_path(path).is_file() else None
    with tempfile.TemporaryDirectory(prefix="sopdeploy-") as folder:
        archive = Path(folder) / f"bundle{ARCHIVE_SUFFIX}"
        with archive.open("wb") as file:
            write_archive(bundle, file)
        if destination.startswith(OCI):
            url = push_artifact(archive, signature, destination, bundle.manifest.id)
        else:
            name = bundle.manifest.name + ARCHIVE_SUFFIX
            if signature is not None:
                put(signature, destination, name + SUFFIX)
            url = put(archive, destination, name)
        return Pushed(
            url=url,
            bytes=archive.stat().st_size,
            sha256=sha256_of(archive),
            signed=signature is not None,
        )


def pull(
    source: str,
    destination: Path,
    *,
    sha256: str | None = None,
    require_signature: Path | None = None,
    max_bytes: int = _MAX_BYTES,
) -> Pulled:
    """Download the archive at *source* and write its bundle into the folder *destination*.

    Order of checks: at most *max_bytes* are downloaded to a hidden folder; their hash must equal *sha256* if
    given; files are unpacked into the hidden folder and their hashes checked; the public key file
    *require_signature*, if given, must verify the signature of the files. The bundle gets its name last.
    Without a key, an existing signature is kept. Raises `BundleError` if a check fails, and `ConfigError` if
    *sha256* is not a hash or *require_signature* is not a key file.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError("use the 64 hexadecimal digits that `push` printed", setting="sha256", value=sha256)
    with staging(destination) as download, staging(destination) as folder:
        name = re.sub(r"[^\w.-]", "_", source.rpartition("/")[2])[-100:] or "archive"  # shown in errors
        archive, signature = download / name, download / (name + SUFFIX)
        if source.startswith(OCI):
            pull_artifact(source, archive, signature, max_bytes)
        else:
            get(source, archive, max_bytes)
            if require_signature is not None:
                try:
                    get(source + SUFFIX, signature, MAX_FILE_BYTES)
                except BundleError as error:
                    raise BundleError(
                        f"{source}: no signature beside it ({error}); see `sopdeploy sign`"
                    ) from error
        digest = sha256_of(archive)
        if sha256 is not None and not hmac.compare_digest(digest, sha256):
            raise BundleError(
                f"that of {source} is {digest}; check both and download it again", setting="sha256"
            )
        manifest = archived_manifest(archive)
        unpack(archive, manifest, folder)
        try:
            open_bundle(folder)
            if require_signature is not None:
                check_signature(folder, signature, require_signature)
        except BundleError as error:  # users know the source, not the hidden folder
            raise BundleError(str(error).replace(str(folder), source)) from error
        path = publish(folder, manifest, destination)
        if signature.is_file() and (require_signature is not None or not signature_path(path).exists()):
            signature.replace(signature_path(path))
    return Pulled(path=path, sha256=digest, verified=require_signature is not None)
