"""Push bundles to folders and object stores, and pull them back, with all checks.

A bundle is packed as one tar file with exactly one valid byte sequence. The manifest is the first entry and
determines the rest: the other files sorted by name, as plain files with mode 0644, no owner and time 0. The
reader does not parse tar. It computes each expected header and compares bytes, so links, paths, devices, long
names, duplicates and trailing data are rejected. Archives of equal bundles are equal.
"""

import hmac
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sopdeploy.bundle.folder import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Bundle,
    check_file_name,
    open_bundle,
    publish,
    staging,
)
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.bundle.signing import MAX_FILE_BYTES, SUFFIX, check_signature, signature_path
from sopdeploy.bundle.storage import get, put
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import BLOCK_BYTES, writing
from sopdeploy.files import sha256 as sha256_of

ARCHIVE_SUFFIX = ".tar"
MAX_ARCHIVE_BYTES = 8_000_000_000
BLOCK = 512
END = bytes(2 * BLOCK)
SIZE_FIELD = slice(124, 136)  # of a tar header, an octal number


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

    *destination* is a folder or an fsspec URL, such as `s3://...` and `hf://...`. A signature beside the
    bundle is uploaded first, so a reader who sees the archive also finds it. Raises `BundleError` for a
    damaged bundle or a failed upload.
    """
    bundle = open_bundle(path)
    signature = signature_path(path) if signature_path(path).is_file() else None
    with tempfile.TemporaryDirectory(prefix="sopdeploy-") as folder:
        archive = Path(folder) / f"bundle{ARCHIVE_SUFFIX}"
        with archive.open("wb") as file:
            write_archive(bundle, file)
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
) -> Pulled:
    """Download the archive at *source* and write its bundle into the folder *destination*.

    Order of checks: at most `MAX_ARCHIVE_BYTES` are downloaded to a hidden folder; their hash must equal
    *sha256* if given; files are unpacked into the hidden folder and their hashes checked; the public key file
    *require_signature*, if given, must verify the signature of the files. The bundle gets its name last.
    Without a key, an existing signature is kept. Raises `BundleError` if a check fails, and `ConfigError` if
    *sha256* is not a hash or *require_signature* is not a key file.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError("use the 64 hexadecimal digits that `push` printed", setting="sha256", value=sha256)
    with staging(destination) as download, staging(destination) as folder:
        name = re.sub(r"[^\w.-]", "_", source.rpartition("/")[2])[-100:] or "archive"  # shown in errors
        archive, signature = download / name, download / (name + SUFFIX)
        get(source, archive, MAX_ARCHIVE_BYTES)
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
        if require_signature is not None:
            signature.replace(signature_path(path))
    return Pulled(path=path, sha256=digest, verified=require_signature is not None)


def write_archive(bundle: Bundle, file: BinaryIO) -> None:
    """Write the archive of *bundle* to *file*; raise `BundleError` for a name that does not fit a header."""
    raw = bundle.manifest.to_bytes()
    file.write(header(MANIFEST, len(raw)) + raw + padding(len(raw)))
    for name, record in sorted(bundle.manifest.files.items()):
        file.write(header(name, record.bytes))
        with (bundle.path / name).open("rb") as content:
            shutil.copyfileobj(content, file, BLOCK_BYTES)
        file.write(padding(record.bytes))
    file.write(END)


def archived_manifest(archive: Path) -> Manifest:
    """Read the manifest at the start of *archive*.

    Raises `BundleError` if the file is not a bundle archive.
    """
    try:
        with archive.open("rb") as file:
            first = file.read(BLOCK)
            digits = first[SIZE_FIELD].rstrip(b"\0 ")
            if not digits or digits.strip(b"01234567"):
                raise ValueError("does not begin with a tar header")
            size = int(digits, 8)
            if size > MAX_MANIFEST_BYTES or first != header(MANIFEST, size):
                raise ValueError("does not begin with a manifest")
            raw = file.read(size)
        manifest = Manifest.from_bytes(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{archive.name}: not an archive of `sopdeploy push` ({error}); give the .tar file that it wrote"
        ) from error
    return manifest


def unpack(archive: Path, manifest: Manifest, folder: Path) -> None:
    """Write the files of *archive* into the empty *folder*; *manifest* comes from `archived_manifest`.

    Raises `BundleError` if anything but file contents differs from what `write_archive` writes. File contents
    are checked later by `open_bundle`.
    """
    raw = manifest.to_bytes()
    (folder / MANIFEST).write_bytes(raw)
    with archive.open("rb") as file:

        def expect(expected: bytes, name: str) -> None:
            if file.read(len(expected)) != expected:
                raise BundleError(
                    f"{archive.name}: {name!r} is not packed as `sopdeploy push` packs it"
                    "; push the bundle again"
                )

        file.seek(BLOCK + len(raw))
        expect(padding(len(raw)), MANIFEST)
        for name, record in sorted(manifest.files.items()):
            check_file_name(Path(archive.name), name)
            if name.casefold() == MANIFEST:
                raise BundleError(
                    f"{archive.name}: its manifest lists {name!r}, the manifest itself; push the bundle again"
                )
            expect(header(name, record.bytes), name)
            size = record.bytes
            with writing(name, BundleError), (folder / name).open("xb") as target:
                while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
                    target.write(block)
                    size -= len(block)
            expect(padding(record.bytes), name)
        expect(END, "end of archive")
        if file.read(1):
            raise BundleError(f"{archive.name}: has data after its end; push the bundle again")


def header(name: str, size: int) -> bytes:
    """Build the USTAR header of a plain file; raise `BundleError` if *name* or *size* does not fit."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise BundleError(
            f"{name!r}: its name or size does not fit into a tar header ({error}); export the bundle again"
        ) from error


def padding(size: int) -> bytes:
    """Return the zero bytes that fill the last block of a file of *size* bytes."""
    return bytes(-size % BLOCK)
