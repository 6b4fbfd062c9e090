"""Write bundles: fill a hidden folder, list and hash its files, and give it its final name.

The folder is beside its destination, so an incomplete bundle never has its final name. Does not
import torch.
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sopdeploy.base.config import parse_json
from sopdeploy.base.file_systems import flush, set_mode
from sopdeploy.base.files import (
    FULL_ERRNOS,
    MANIFEST,
    atomic_write,
    link_latest,
    new_folder,
    sha256,
    temporary_folder,
    writing,
)
from sopdeploy.base.project import utc_now
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.folder import CARD, SIGNATURE_SUFFIX, Bundle, open_bundle
from sopdeploy.bundle.manifest import CERTIFICATE, FileRecord, Manifest, to_json
from sopdeploy.errors import BundleError, ConfigError

_CARD_END = "\n## Proof and measurements\n"  # of the section of a model card about the training
_SEALED = ("sha256", "contents")  # fields of a certificate that `seal` writes


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Yield an empty folder for a new bundle, hidden in *destination*; delete it at the end unless it was renamed.

    *destination* is created, and removed again if it stays empty. The folder is locked as long
    as this process uses it; folders that killed processes left are deleted. Raises `StorageError`
    if the folder cannot be created, or if the disk is full.
    """
    with ExitStack() as folders:
        with writing(destination):
            folders.enter_context(new_folder(destination))
            folder = folders.enter_context(temporary_folder(destination))
        try:
            yield folder
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                with writing(destination):  # converts it to `StorageError`
                    raise
            raise


def seal(
    folder: Path,
    manifest_without_files: Mapping[str, Any],
    certificate: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash every file of the new bundle in *folder*, write its manifest and return it.

    The *certificate*, if it is given, is written before the manifest, which also lists it. Its
    `contents` is the hash of a manifest of all other files, and its `sha256` that of its other
    fields. So `verify` detects if one of them is changed alone.
    """

    def record(path: Path) -> FileRecord:
        return FileRecord(bytes=path.stat().st_size, sha256=sha256(path))

    def manifest_of(files: Mapping[str, FileRecord]) -> Manifest:
        return Manifest(
            **manifest_without_files, files=dict(sorted(files.items()))
        ).with_written_defaults()

    files = {path.name: record(path) for path in folder.iterdir()}
    manifest = manifest_of(files)

    # The certificate names the hash of the manifest without it; the final manifest lists it, too.
    if certificate is not None:
        fields = {**certificate, "contents": manifest.contents_sha256}
        path = folder / CERTIFICATE
        path.write_bytes(
            to_json({"sha256": hashlib.sha256(to_json(fields)).hexdigest(), **fields})
        )
        manifest = manifest_of({**files, CERTIFICATE: record(path)})

    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def publish(folder: Path, manifest: Manifest, destination: Path) -> Path:
    """Rename the *folder* of a sealed bundle to `destination/<project>-<id>` and return the new path.

    An identical bundle that already exists is kept and gets the time of *manifest*, unless it
    is signed. Then `destination/latest` is linked to the bundle. Raises `BundleError` if a
    different, damaged or signed bundle has the name.
    """
    target = destination / manifest.name
    existing = _give_final_name(folder, manifest, target)

    # If the bundle was here before, with another time, the new manifest replaces its manifest.
    if existing != manifest:
        signature = target.with_name(target.name + SIGNATURE_SUFFIX)
        if signature.exists():  # it would no longer be valid
            raise BundleError(
                f"{target} exists, signed with the time of its export; move "
                f"{signature.name} to another folder, export again and sign it "
                "again"
            )
        with (
            writing(target / MANIFEST),
            atomic_write(target / MANIFEST, durable=True) as partial,
        ):
            partial.write_bytes(manifest.to_bytes())

    link_latest(target)
    return target


def check_can_be_fitted(manifest: Manifest) -> None:
    """Raise `ConfigError` for a bundle whose classifier was divided by a temperature, which only a checkpoint has."""
    if manifest.rules.temperature != 1 and not manifest.rules.divides_logits:
        raise ConfigError(
            "this bundle has the temperature of its training; fit the checkpoint, and export that",
            setting="fit_decision",
        )


def publish_decision(bundle: Bundle, decision: Decision, destination: Path) -> Path:
    """Write a copy of *bundle*, as `open_bundle` read it, that decides by *decision*; return its path.

    The graph is the same, so the decision divides its logits by the temperature. The model card gets lines
    about it. Raises the errors of `check_can_be_fitted` and of `publish`.
    """
    manifest = bundle.manifest
    check_can_be_fitted(manifest)
    fields = {name: getattr(manifest, name) for name in type(manifest).model_fields}
    del fields["files"]
    fields |= {"decision": decision.for_trained_logits(), "exported_at": utc_now()}
    certificate = parse_json(bundle.contents[CERTIFICATE])
    for key in _SEALED:
        del certificate[key]

    with staging(destination) as folder:
        for name in manifest.files.keys() - {CERTIFICATE, CARD}:
            with (folder / name).open("wb") as file:
                file.writelines(bundle.blocks(name))
        if CARD in bundle.contents:
            lines = "".join(f"- {key}: {text}\n" for key, text in decision.rows())
            front, end, rest = bundle.contents[CARD].decode().partition(_CARD_END)
            (folder / CARD).write_text(f"{front}{lines}{end}{rest}", encoding="utf-8")
        return publish(folder, seal(folder, fields, certificate), destination)


def _give_final_name(folder: Path, manifest: Manifest, target: Path) -> Manifest:
    """Rename a sealed *folder* to *target* unless an identical bundle is there.

    Returns the manifest of the bundle at *target*, read again: it may have another time than
    *manifest*. Raises `BundleError` if a different or damaged bundle is there; it stays as it is.
    """
    if os.path.lexists(target):
        if not target.is_dir():
            raise BundleError(
                f"{target}: has the name of the bundle, but is not a folder; move it away"
            )
        return _read_same_bundle(target, manifest)

    with writing(target):
        is_new = _publish(folder, target)  # false if another process was faster
        try:
            return _read_same_bundle(target, manifest)
        except BundleError:
            if is_new:  # somebody exchanged a file between the check and the new name
                target.rename(folder)  # the caller deletes it
            raise


def _publish(folder: Path, target: Path) -> bool:
    """Let everybody read the sealed *folder*, flush its files and rename it to *target*.

    Returns false if *target* exists.
    """
    set_mode(folder, 0o755)

    for path in folder.iterdir():
        set_mode(path, 0o644)
        with path.open("rb") as file:
            flush(file.fileno())

    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        return False
    return True


def _read_same_bundle(target: Path, manifest: Manifest) -> Manifest:
    """Read the bundle *target* and return its manifest; raise `BundleError` for another content than *manifest*."""
    manifest_here = open_bundle(target, with_graph=False).manifest

    if not manifest_here.has_content_of(manifest):
        raise BundleError(
            f"{target} exists with another manifest; choose another folder", setting="out"
        )
    return manifest_here
