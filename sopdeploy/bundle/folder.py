"""The bundle: the folder that carries a network from export to service. No torch here.

`docs/bundle.md` describes the format. A bundle is written whole into a hidden folder beside its
destination and renamed, so a half-written bundle never has a bundle's name. It is opened in a fixed
order: manifest schema, then every path, then sizes, then hashes; only then is anything parsed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sopdeploy.bundle.manifest import FileRecord, Manifest
from sopdeploy.errors import BundleError

MANIFEST = "manifest.json"
REQUIRED = ("model.onnx", "labels.json", "certificate.json", "parity.json", "probes.npz")
MAX_MANIFEST_BYTES = 4_000_000
READ_BYTES = 1 << 20
LONGEST_NAME = 255  # bytes; no common file system takes more


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle: its files exist and have the sizes and hashes of the manifest."""

    path: Path
    manifest: Manifest
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return `<model>-<id>`, the name the bundle was written under."""
        return self.manifest.name

    @property
    def onnx(self) -> Path:
        """Return the path of the graph."""
        return self.path / "model.onnx"

    @property
    def probes(self) -> Path:
        """Return the path of the probe images and the logits they must give."""
        return self.path / "probes.npz"


def digest(path: Path) -> str:
    """Return the sha256 of the file at *path* in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):  # Python 3.10, where TensorRT 8.6 lives, has no file_digest
            found.update(block)
    return found.hexdigest()


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Give an empty hidden folder inside *destination* that is always gone afterwards."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".bundle-", suffix=".partial", dir=destination))
    except OSError as problem:
        raise BundleError(f"{destination}: cannot be written ({problem.strerror})") from problem
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Return size and hash of every file of *folder*, by name."""
    return {
        path.name: FileRecord(bytes=path.stat().st_size, sha256=digest(path))
        for path in sorted(folder.iterdir())
    }


def seal(folder: Path, manifest_without_files: Mapping[str, Any]) -> Manifest:
    """Hash every file of *folder*, write its manifest and return it."""
    files = file_records(folder)
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise BundleError(f"{folder}: cannot be sealed, {missing[0]} is missing")
    manifest = Manifest(**manifest_without_files, files=files)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def publish(folder: Path, manifest: Manifest, destination: Path) -> Path:
    """Rename a sealed *folder* to `destination/<model>-<id>` and return that path.

    An identical bundle that is already there stays; the same content gives the same name.
    """
    target = destination / manifest.name
    if target.exists():
        existing = open_bundle(target)
        if existing.manifest != manifest:
            raise BundleError(f"{target}: exists with another manifest; choose another --out")
        return target
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.rename(target)
    return target


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the bundle at *path*.

    Raises `BundleError` where there is none, or where it has another schema.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"{path}: {why_no_bundle(path)}")
    if not file.is_file() or file.is_symlink():
        raise BundleError(f"{path}: {why_no_manifest(path)}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes, not a manifest")
    try:
        return Manifest.from_bytes(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise BundleError(f"{file}: {problem}; copy or export the bundle again") from problem


def why_no_bundle(path: Path) -> str:
    """Return why *path*, which is no folder, is no bundle, and what to give instead."""
    if path.suffix == ".pt" and path.is_file():
        return f"a checkpoint, no bundle; run: sopdeploy export {path} --detach"
    if path.suffix == ".tar" and path.is_file():
        return f"an archive, no bundle; run: sopdeploy pull {path} bundles"
    return f"no bundle here; a bundle is a folder with a {MANIFEST}"


def why_no_manifest(path: Path) -> str:
    """Return why the folder *path* is no bundle, and what to give instead."""
    inside = sorted(file.parent for file in path.glob(f"[!.]*/{MANIFEST}"))
    if inside:
        return f"holds bundles and is none; give one of them, such as {inside[0]}"
    return f"no {MANIFEST}; is this a bundle that `sopdeploy export` wrote?"


def open_bundle(path: Path) -> Bundle:
    """Check the bundle at *path* and return it.

    Raises `BundleError` naming the first file whose path, size or hash is not the manifest's.
    """
    manifest = read_manifest(path)
    for name in manifest.files:
        check_path(path, name)
    for required in REQUIRED:
        if required not in manifest.files:
            raise BundleError(f"{path}: the manifest lists no {required}; export the bundle again")
    for name, record in manifest.files.items():
        check_size(path / name, record)
    for name, record in manifest.files.items():
        if digest(path / name) != record.sha256:
            raise BundleError(
                f"{path / name}: its sha256 is not the one in the manifest; the file was damaged: "
                "copy or export the bundle again"
            )
    return Bundle(path=path, manifest=manifest, labels=read_labels(path, manifest))


def check_path(bundle: Path, name: str) -> None:
    """Refuse a file *name* that leaves the bundle's folder, is reached through a link or is not there."""
    check_name(bundle, name)
    if (bundle / name).is_symlink():
        raise BundleError(f"{bundle / name}: is a link; a bundle holds plain files only")
    if not (bundle / name).is_file():
        raise BundleError(f"{bundle / name}: missing; copy or export the bundle again")


def check_name(bundle: Path, name: str) -> None:
    """Refuse a *name* in the manifest of *bundle* that is not the plain one of a file."""
    plain = PurePosixPath(name).parts == (name,) and len(name.encode()) <= LONGEST_NAME
    if not plain or name in {"/", ".."} or "\\" in name or "\0" in name:
        raise BundleError(f"{bundle}: the manifest names {name!r}, which is not a plain file name")


def check_size(file: Path, record: FileRecord) -> None:
    """Refuse a *file* whose size is not the recorded one."""
    size = file.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{file}: has {size} bytes, the manifest says {record.bytes}; copy or export the bundle again"
        )


def read_labels(path: Path, manifest: Manifest) -> tuple[str, ...]:
    """Return the class names in output order; refuse a number of them the graph does not give."""
    try:
        labels = json.loads((path / "labels.json").read_bytes())
    except (ValueError, RecursionError) as problem:
        raise BundleError(f"{path / 'labels.json'}: not JSON ({problem})") from problem
    classes = manifest.outputs[0].shape[-1]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{path / 'labels.json'}: not a list of class names")
    if len(labels) != classes:
        raise BundleError(f"{path / 'labels.json'}: {len(labels)} class names for {classes} outputs")
    return tuple(labels)
