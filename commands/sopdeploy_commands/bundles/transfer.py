"""`sopdeploy sign`, `push` and `pull`: sign a bundle, upload it as one archive, download and check it."""

import hashlib
import hmac
import io
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sopdeploy.bundle import archive as tar
from sopdeploy.bundle import signing
from sopdeploy.bundle.folder import SIGNATURE_SUFFIX, open_bundle, read_files
from sopdeploy.bundle.listing import read_bundles
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.bundle.publication import give_final_name, staging
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import link_latest, writing
from sopdeploy.files import sha256 as sha256_of
from sopdeploy.names import is_bundle_name
from sopdeploy.photos.files import check_takes_output
from sopdeploy.proxies import without_password


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """URL or path, size and sha256 of a pushed archive, and whether a signature was pushed too."""

    url: str
    bytes: int
    sha256: str
    signed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """Path of a pulled bundle, sha256 of its archive, whether its signature was checked, and if it is new."""

    path: Path
    sha256: str
    verified: bool
    is_new: bool


def _show_pushed(pushed: Pushed) -> None:
    signed = "with its signature" if pushed.signed else "not signed"
    print_field("pushed", f"{pushed.url} ({pushed.bytes:,} bytes, {signed})", style="")
    print_field("sha256", pushed.sha256, style="")


@command(
    _show_pushed, examples=("sopdeploy push bundles/photos-3f6c01d2a4b7 s3://models/flowers",)
)
def push(bundle: Path, destination: str) -> Pushed:
    """Upload a bundle as one reproducible archive, with its signature if there is one.

    The signature is uploaded first, so a reader who sees the archive also finds it.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        destination: A folder, s3://BUCKET/PATH or hf://OWNER/NAME.

    Raises:
        BundleError: The bundle is damaged, or the upload failed.
    """
    opened_bundle = open_bundle(bundle)
    signature = signing.signature_path(opened_bundle.path)
    signed = signature.is_file()

    with tempfile.TemporaryDirectory(prefix="sopdeploy-") as folder:
        archive = Path(folder) / f"bundle{tar.ARCHIVE_SUFFIX}"
        with writing(archive), archive.open("wb") as file:
            tar.write_archive(opened_bundle, file)

        # The signature goes first: whoever sees the archive also finds its signature.
        name = opened_bundle.manifest.name + tar.ARCHIVE_SUFFIX
        if signed:
            tar.upload(signature, destination, name + SIGNATURE_SUFFIX)
        url = tar.upload(archive, destination, name)
        return Pushed(
            url=url, bytes=archive.stat().st_size, sha256=sha256_of(archive), signed=signed
        )


def _show_pulled(pulled: Pulled) -> None:
    checked = "signature and hashes" if pulled.verified else "hashes"
    print_field(
        "pulled",
        f"{pulled.path} ({checked} checked{'' if pulled.is_new else '; already here'})",
        style="",
    )


@command(
    _show_pulled,
    examples=("sopdeploy pull s3://models/flowers/photos-3f6c01d2a4b7.tar bundles",),
)
def pull(
    source: str,
    destination: Path,
    *,
    project: str | None = None,
    sha256: str | None = None,
    require_signature: Path | None = None,
    allow_older: bool = False,
) -> Pulled:
    """Download a bundle, check name, age, signature and hashes, and only then move it to its final name.

    A limited number of bytes is downloaded. The files are unpacked into a hidden folder and their
    hashes checked; the bundle gets its name last. A bundle that is already there never changes.

    Args:
        source: Location printed by `push`: a path, s3://... or hf://...
        destination: Folder for the bundle.
        project: Project that the bundle must have; by default the name of the archive says it.
        sha256: Expected sha256 of the archive.
        require_signature: Require a signature that this public key verifies.
        allow_older: Accept a bundle that was exported before the newest one of its project in the folder.

    Raises:
        BundleError: A check failed.
        ConfigError: *sha256* is not a hash, or *require_signature* is not a key file.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(
            "use the 64 hexadecimal digits that `push` printed", setting="sha256", value=sha256
        )

    check_takes_output(destination, None)
    with ExitStack() as stack:
        folder = stack.enter_context(staging(destination))
        # A file without a name: nobody can exchange it, and nothing of it can stay.
        with writing(destination):
            archive = stack.enter_context(tempfile.TemporaryFile(dir=destination))
        name = re.sub(r"[^\w.:/@-]", "_", without_password(source))[-200:]  # in messages

        # Download the archive and hash it, before anything reads what it holds.
        tar.download(source, archive, tar.MAX_ARCHIVE_BYTES, destination)
        signature = (
            None if require_signature is None else _download_signature(source, destination)
        )
        archive.seek(0)
        digest = hashlib.file_digest(archive, "sha256").hexdigest()
        if sha256 is not None and not hmac.compare_digest(digest, sha256):
            message = f"{source} has {digest}; check both and download it again"
            raise BundleError(message, setting="sha256")  # users see "--sha256: SOURCE has ..."

        # The manifest comes first in the archive and decides whether the rest may be unpacked.
        manifest = tar.read_archived_manifest(archive, name)
        _check_project(manifest, source, project)
        with writing(destination):
            tar.unpack(archive, name, manifest, folder)

        # Every file has its hash and, if required, the manifest a signature with a known key.
        try:
            unpacked_bundle = read_files(folder, manifest, with_graph=False)
            if require_signature is not None and signature is not None:
                signing.check_signature(unpacked_bundle, signature, require_signature)
        except BundleError as error:  # users know the source, not the hidden folder
            raise BundleError(str(error).replace(str(folder), source)) from error

        if not allow_older:
            _check_is_not_older(manifest, source, destination)

        # Only now the bundle gets its name, and `latest` leads to it.
        placed = give_final_name(folder, manifest, destination, signature)
        path = destination / manifest.name
        link_latest(path)
    return Pulled(
        path=path, sha256=digest, verified=require_signature is not None, is_new=placed.is_new
    )


def _download_signature(source: str, destination: Path) -> bytes:
    """Download the signature beside *source*; raise `BundleError` if there is none."""
    content = io.BytesIO()
    try:
        tar.download(source + SIGNATURE_SUFFIX, content, signing.MAX_FILE_BYTES, destination)
    except BundleError as error:
        message = f"{source}: no signature beside it ({error}); see `sopdeploy sign`"
        raise BundleError(message) from error

    return content.getvalue()


def _check_project(manifest: Manifest, source: str, project: str | None) -> None:
    """Raise `BundleError` unless *manifest* is of *project*, or, without one, of what *source* is named after.

    A signature does not contain the name of an archive: without this check, who can write to a
    store could put one signed bundle in the place of another.
    """
    name = source.rpartition("/")[2].removesuffix(tar.ARCHIVE_SUFFIX)

    if project is not None:
        is_wanted = manifest.project == project
    elif is_bundle_name(name):  # PROJECT-ID: this bundle only
        is_wanted = name == manifest.name
    else:  # PROJECT: any bundle of it
        is_wanted = name == manifest.project

    if not is_wanted:
        raise BundleError(
            f"{source}: contains {manifest.name}, not {project or name}; check the address",
            remedies={"project": manifest.project},
        )


def _check_is_not_older(manifest: Manifest, source: str, destination: Path) -> None:
    """Raise `BundleError` if *destination* has a bundle of the project that was exported later."""
    manifests = [
        listed.manifest for listed in read_bundles(destination) if listed.manifest is not None
    ]
    of_project = [other for other in manifests if other.project == manifest.project]
    newest = max(of_project, key=lambda other: other.exported_at, default=manifest)

    time = manifest.exported_at
    for other in of_project:
        # The bundle is in the folder already: its time there counts, so that a later one in the
        # archive does not make it newer.
        if other.id == manifest.id:
            time = other.exported_at

    if time < newest.exported_at:
        raise BundleError(
            f"{source}: {manifest.name} was exported at {time}, before {newest.name} in {destination} "
            f"({newest.exported_at})",
            remedies={"allow_older": True},
        )


@command(examples=("sopdeploy sign bundles/photos-3f6c01d2a4b7 --key release.key",))
def sign(bundle: Path, *, key: Path) -> None:
    """Sign a bundle: write BUNDLE.sig beside it, for --require-signature of `pull` and `serve`.

    The signature has the format of OpenSSF Model Signing, so `model_signing verify key` also
    accepts it.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        key: Private key in a PEM file: an elliptic curve key.
    """
    print_field("signed", str(signing.write_signature(bundle, key)), style="")
