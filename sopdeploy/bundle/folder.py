"""Write, open and list bundles: folders that carry an exported network to the service.

docs/bundle.md describes the format. A bundle is written to a hidden folder beside its
destination and then renamed, so an incomplete bundle never has its final name. Opening checks
in a fixed order: manifest schema, all paths, all sizes, all hashes. File contents are parsed
only after that. Does not import torch.

Of the bundles of one project in a folder, the live one is served, if `promote` has recorded one
there (`live`); otherwise the one that was exported last and was not refused; of equal times, the
one with the greater id. The times are those of the exporting machines. Neither the names of the
folders nor the link `latest` have an effect, because copies of a folder may lack or change them.

A bundle is read once: `Bundle` holds the very bytes that were hashed. Whoever exchanges a file
in the folder later, even a moment after it was read, changes nothing that runs.
"""

import errno
import hashlib
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sopdeploy.bundle.live import read_live
from sopdeploy.bundle.manifest import CERTIFICATE, FileRecord, Manifest, to_json
from sopdeploy.bundle.sealed import HashedBlocks, SealedFile
from sopdeploy.errors import BundleError
from sopdeploy.file_systems import flush, set_mode
from sopdeploy.files import (
    FULL_ERRNOS,
    GRAPH,
    LATEST,
    MANIFEST,
    atomic_write,
    has_manifest,
    link_latest,
    new_folder,
    open_regular,
    os_reason,
    read_at_most,
    sha256,
    temporary_folder,
    writing,
)
from sopdeploy.names import read_labels
from sopdeploy.paths import describe_wrong

PROBES = "probes.npz"
CARD = "README.md"
REQUIRED = (GRAPH, "labels.json", CERTIFICATE, "parity.json", "precision.json", PROBES)
MAX_MANIFEST_BYTES = 4_000_000
MAX_JSON_BYTES = 16_000_000  # of any other JSON file
MAX_CONTENT_BYTES = 512_000_000  # of all files but the graph, which are in memory
SIGNATURE_SUFFIX = ".sig"  # of the file beside a bundle or an archive
MAX_NAME_BYTES = 255  # limit of common file systems

log = logging.getLogger("sopdeploy.bundle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle as it was read: the bytes that have the sizes and hashes of the manifest.

    `path` is where it was read, for messages and for what lies beside it; nothing reads the
    files there again. `contents` has the bytes of the files by name, except the graph.
    `graph` is None if the graph was hashed only, or is in a runtime already.
    """

    path: Path
    manifest: Manifest
    labels: tuple[str, ...]
    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    graph: SealedFile | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """`<project>-<id>`, the original folder name."""
        return self.manifest.name

    @property
    def onnx(self) -> SealedFile:
        """The ONNX graph; raises `ValueError` if the bundle was read without it."""
        if self.graph is None:
            raise ValueError(f"{self.path / GRAPH}: was hashed, but not kept")
        return self.graph

    def reduced(self) -> "Bundle":
        """Return the bundle with only the files that a server shows, which frees the memory of its other files."""
        shown = {
            name: self.contents[name] for name in (CARD, CERTIFICATE) if name in self.contents
        }
        return replace(self, contents=shown, graph=None)


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Yield an empty hidden folder in *destination*; delete it at the end unless it was renamed.

    The folder is locked as long as this process uses it; folders that killed processes left are
    deleted. Raises `StorageError` if the folder cannot be created, or if the disk is full.
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
    """Hash every file in *folder*, write the manifest and return it.

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
    """Rename a sealed *folder* to `destination/<project>-<id>` and return the new path.

    An identical bundle that already exists is kept and gets the time of *manifest*, unless it
    is signed. Then `destination/latest` is linked to the bundle. Raises `BundleError` if a
    different, damaged or signed bundle has the name.
    """
    existing = give_final_name(folder, manifest, destination).manifest

    # If the bundle was here before, with another time, the new manifest replaces its manifest.
    target = destination / manifest.name
    if existing != manifest:
        signature = target.with_name(target.name + SIGNATURE_SUFFIX)
        if signature.exists():  # it would no longer be valid
            raise BundleError(
                f"{target} exists, signed with the time of its export; move {signature.name} to another "
                "folder, export again and sign it again"
            )
        with (
            writing(target / MANIFEST),
            atomic_write(target / MANIFEST, durable=True) as partial,
        ):
            partial.write_bytes(manifest.to_bytes())

    link_latest(target)
    return target


class PlacedBundle(NamedTuple):
    """The manifest of the bundle that has the final name, and whether it was written by this process."""

    manifest: Manifest
    is_new: bool


def give_final_name(
    folder: Path, manifest: Manifest, destination: Path, signature: bytes | None = None
) -> PlacedBundle:
    """Rename a sealed *folder* to `destination/<project>-<id>` unless an identical bundle has the name.

    A *signature* of *manifest* is written first, so that the bundle is never there without it.
    The manifest of the bundle that has the name at the end is read again: it equals *manifest*,
    or without a *signature* may have another time. Raises `BundleError` if a different or
    damaged bundle has the name; it stays as it is.
    """
    target = destination / manifest.name
    signature_file = target.with_name(target.name + SIGNATURE_SUFFIX)
    read_same = partial(_read_same_bundle, target, manifest, is_signed=signature is not None)

    # The bundle may be here already; then only its signature is written.
    if os.path.lexists(target):
        if not target.is_dir():
            raise BundleError(
                f"{target}: has the name of the bundle, but is no folder; move it away"
            )
        manifest_here = read_same()
        if signature is not None:
            with writing(target):
                _write_signature(signature_file, signature)
        return PlacedBundle(manifest_here, is_new=False)

    # The signature comes first: nobody sees a bundle without it. After an error, a new one is
    # deleted again.
    with writing(target), ExitStack() as on_error:
        if signature is not None:
            if not os.path.lexists(signature_file):
                on_error.callback(signature_file.unlink, missing_ok=True)
            _write_signature(signature_file, signature)

        is_new = _publish(folder, target)  # false if another process was faster
        try:
            manifest_here = read_same()
        except BundleError:
            if is_new:  # somebody exchanged a file between the check and the new name
                target.rename(folder)  # the caller deletes it
            raise

        on_error.pop_all()
    return PlacedBundle(manifest_here, is_new)


def _write_signature(path: Path, signature: bytes) -> None:
    with atomic_write(path, durable=True) as partial_file:
        partial_file.write_bytes(signature)


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


def _read_same_bundle(target: Path, manifest: Manifest, *, is_signed: bool) -> Manifest:
    """Read the bundle *target* and return its manifest; raise `BundleError` unless it is *manifest*.

    Unless it *is_signed*, the time of the export may differ.
    """
    manifest_here = open_bundle(target, with_graph=False).manifest

    if not manifest_here.has_content_of(manifest):
        raise BundleError(
            f"{target} exists with another manifest; choose another folder", setting="out"
        )

    if is_signed and manifest_here != manifest:
        raise BundleError(
            f"{target}: exported at {manifest_here.exported_at}, but the signed copy at {manifest.exported_at}; "
            "move this folder away and pull again"
        )
    return manifest_here


def follow_link(path: Path) -> Path:
    """Return the bundle that *path* means now: for a link, where it leads; for `latest`, the live bundle.

    `latest` leads to the last export, which `promote` may have refused. If `promote` has recorded
    a live bundle of the same project beside this link, that one is meant.
    """
    if not path.is_symlink():
        return path

    # Links other than `latest` lead to one bundle for ever.
    target = path.parent / path.readlink()
    if path.name != LATEST or not (live := read_live(path.parent).live):
        return target

    # Of the live bundles, the one of the project that the link leads to.
    try:
        project = read_manifest(target).project
    except BundleError:  # its reader names the problem
        return target
    for other in map(Path, live):
        with suppress(BundleError):
            if read_manifest(other).project == project:
                return path.parent / os.path.relpath(other, os.path.realpath(path.parent))
    return target


def is_bundle(path: Path) -> bool:
    """Check whether *path* is the folder of a complete bundle; reads no file."""
    return has_manifest(path) and all((path / name).is_file() for name in REQUIRED)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle folder *path*; raise `BundleError` if it is missing or invalid."""
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file() or file.is_symlink():
        raise BundleError(f"{path}: {describe_wrong(path, 'bundle')}")

    with open_regular(file) as stream:
        content = read_at_most(stream, MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{file}: larger than {MAX_MANIFEST_BYTES} bytes, not a manifest; copy or export the bundle again"
        )

    try:
        return Manifest.from_bytes(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: {error}; copy or export the bundle again") from error


def open_bundle(path: str | Path, *, with_graph: bool = True) -> Bundle:
    """Check and read the bundle at *path*, a folder or a link to one.

    Raises `BundleError` that names the first file whose path, size or hash differs from the
    manifest.
    """
    meant = note_meaning(Path(path))
    return read_files(meant, read_manifest(meant), with_graph=with_graph)


def note_meaning(path: Path) -> Path:
    """Return `follow_link` of *path*, with a line in the log if that is not where the link leads."""
    meant = follow_link(path)
    if os.path.realpath(meant) != os.path.realpath(path):
        log.warning("%s: the live bundle is used, %s", path, meant)
    return meant


def read_files(path: Path, manifest: Manifest, *, with_graph: bool = True) -> Bundle:
    """Read the files of *manifest* in the folder *path*, each once, and compare their hashes.

    Without *with_graph*, the graph is hashed and not kept. Raises `BundleError` for the first file
    whose path, size or hash differs.
    """
    # Names, and sizes in total, before anything is opened.
    for name in manifest.files:
        check_file_name(path, name)
    for required in REQUIRED:
        if required not in manifest.files:
            raise BundleError(
                f"{path}: the manifest lists no {required}; export the bundle again"
            )
    total = sum(record.bytes for name, record in manifest.files.items() if name != GRAPH)
    if total > MAX_CONTENT_BYTES:
        raise BundleError(
            f"{path}: its files are larger than {MAX_CONTENT_BYTES} bytes; export it again"
        )

    # The folder is opened once, so that no other one can take its name meanwhile.
    contents: dict[str, bytes] = {}
    graph: SealedFile | None = None
    current = path  # for the message of an error
    try:
        with ExitStack() as stack:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)

            for name, record in manifest.files.items():
                current = path / name
                _check_type_and_size(
                    current, os.stat(name, dir_fd=folder, follow_symlinks=False), record
                )

            # Each file is read once, and hashed while it is read.
            for name, record in manifest.files.items():
                current = path / name
                # By now, it may be a link or a FIFO.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                with os.fdopen(os.open(name, flags, dir_fd=folder), "rb", buffering=0) as file:
                    _check_type_and_size(current, os.fstat(file.fileno()), record)
                    blocks = HashedBlocks(file, record.bytes)

                    if name != GRAPH:
                        contents[name] = b"".join(blocks)
                    elif with_graph:
                        graph = SealedFile(blocks)
                    else:
                        deque(blocks, maxlen=0)  # hash without keeping
                    if blocks.sha256 != record.sha256:
                        raise BundleError(
                            f"{current}: its sha256 is not the one in the manifest; the file was damaged: "
                            "copy or export the bundle again"
                        )
    except OSError as error:
        problem = (
            "missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({os_reason(error)})"
        )
        raise BundleError(f"{current}: {problem}; copy or export the bundle again") from error

    labels = _parse_labels(path / "labels.json", contents["labels.json"], manifest)
    return Bundle(path=path, manifest=manifest, labels=labels, contents=contents, graph=graph)


def _check_type_and_size(file: Path, status: os.stat_result, record: FileRecord) -> None:
    """Raise `BundleError` if *file* is no plain file of the size in *record*, or JSON that is too large."""
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(f"{file}: is a link; a bundle contains only plain files")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file}: missing; copy or export the bundle again")

    if status.st_size != record.bytes:
        raise BundleError(
            f"{file}: has {status.st_size} bytes, the manifest says {record.bytes}; "
            "copy or export the bundle again"
        )

    if file.suffix == ".json" and status.st_size > MAX_JSON_BYTES:
        raise BundleError(
            f"{file}: larger than {MAX_JSON_BYTES} bytes; export the bundle again"
        )


def check_file_name(bundle: Path, name: str) -> None:
    """Raise `BundleError` unless *name*, from the manifest, is a plain file name other than `MANIFEST`."""
    is_plain = name not in {"", ".", ".."} and not any(
        character in name for character in "/\\\0"
    )
    is_manifest = name.casefold() == MANIFEST  # some file systems ignore case

    if not is_plain or is_manifest or len(name.encode()) > MAX_NAME_BYTES:
        raise BundleError(
            f"{bundle}: the manifest names {name!r}, which is not a plain file name; export the bundle again"
        )


def _parse_labels(file: Path, content: bytes, manifest: Manifest) -> tuple[str, ...]:
    """Parse the class names; raise `BundleError` if *manifest* has outputs or rules for other ones."""
    try:
        labels = read_labels(content)
    except ValueError as error:
        raise BundleError(f"{file}: {error}; export the bundle again") from error

    if problem := labels_problem(labels, manifest):
        raise BundleError(f"{file}: {problem}; export the bundle again")
    return labels


def labels_problem(labels: Sequence[str], manifest: Manifest) -> str | None:
    """Describe an output or rule of *manifest* that is not for as many classes as *labels*; None if all are."""
    count = manifest.outputs[0].shape[-1]  # of classes
    if len(labels) != count:
        return f"{len(labels)} class names for {count} outputs"
    return manifest.rules.problem_with(len(labels))


class ListedBundle(NamedTuple):
    """A bundle of a folder of bundles; an unreadable `manifest` is None.

    `why_not_served` is empty for a bundle that is served; then `bundle` has its files.
    `is_replaced` is true if another bundle of the project is served instead, or if `promote` has
    refused this one. `is_live` is true if `promote` has recorded it as live.
    """

    path: Path
    manifest: Manifest | None
    why_not_served: str = ""
    is_replaced: bool = False
    is_live: bool = False
    bundle: Bundle | None = None

    @property
    def is_served(self) -> bool:
        """Whether requests for its project are answered by this bundle."""
        return not self.why_not_served

    @property
    def is_damaged(self) -> bool:
        """Whether its files cannot be read, or are not complete."""
        return not self.is_served and not self.is_replaced

    @property
    def rank(self) -> tuple[str, str, bool, Path]:
        """The key by which the bundle to serve is the greatest; of copies, one with its own name."""
        if self.manifest is None:
            return "", "", False, self.path
        has_own_name = self.path.name == self.manifest.name
        return self.manifest.exported_at, self.manifest.id, has_own_name, self.path


def read_bundles(folder: Path) -> Iterator[ListedBundle]:
    """Yield the bundles directly in *folder*, by name; `why_not_served` says why a manifest cannot be read.

    Hidden folders, which are incomplete, and links to folders in *folder* do not count. Raises
    `BundleError` if *folder* exists but cannot be read.
    """
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be read ({error.strerror}); check its permissions"
        ) from error

    # Folders, and links to folders elsewhere. A link to a folder here, such as `latest`, is a
    # second name of it.
    for path in paths:
        try:
            is_link_to_sibling = path.is_symlink() and path.resolve().parent == folder.resolve()
            if path.name.startswith(".") or is_link_to_sibling or not path.is_dir():
                continue
            if any((path / name).exists() for name in (MANIFEST, *REQUIRED)):
                yield ListedBundle(path, read_manifest(path))  # raises without a valid manifest
        # A link that leads to itself raises a `RuntimeError`.
        except (BundleError, OSError, RuntimeError) as error:
            yield ListedBundle(path, None, str(error))


BundleReader = Callable[[Path, Manifest], Bundle]


def list_bundles(folder: Path, read: BundleReader | None = None) -> list[ListedBundle]:
    """List the bundles in *folder*, the last export first, and say which one of each project is served.

    The live bundle of a project is served or, without one, its first complete bundle that was not
    refused. Every manifest is read once. *read* reads all files of the bundles that are served,
    by default `read_files` without the graph. Raises `ConfigError` for a log of promotions that
    cannot be read.
    """
    read = read or partial(read_files, with_graph=False)
    live, refused = read_live(folder)
    bundles = sorted(read_bundles(folder), key=lambda bundle: bundle.rank, reverse=True)

    # The last promoted bundle of a project counts.
    real_paths = [os.path.realpath(bundle.path) for bundle in bundles]
    live_by_project: dict[str, Manifest] = {}
    for place in (real_paths.index(real) for real in live if real in real_paths):
        manifest = bundles[place].manifest
        if manifest is not None and manifest.project not in live_by_project:
            live_by_project[manifest.project] = manifest
            bundles[place] = bundles[place]._replace(is_live=True)

    # Every bundle in order. Without a live one, the first of a project that is complete is served.
    listed = []
    served_by_project = dict(live_by_project)
    for bundle, real in zip(bundles, real_paths, strict=True):
        manifest = bundle.manifest
        if manifest is None:  # `read_bundles` has set `why_not_served`
            listed.append(bundle)
            continue

        served = served_by_project.get(manifest.project)
        if real in refused or (served is not None and not bundle.is_live):
            reason = "refused by promote"
            if served is not None and real not in refused:
                reason = _why_not_served(manifest, served)
            listed.append(bundle._replace(why_not_served=reason, is_replaced=True))
            continue

        try:  # it is served if its files are complete
            listed.append(bundle._replace(bundle=read(bundle.path, manifest)))
            served_by_project[manifest.project] = manifest
        except (BundleError, OSError) as error:
            listed.append(bundle._replace(why_not_served=str(error)))
    return listed


def _why_not_served(manifest: Manifest, served: Manifest) -> str:
    """Say why a bundle with *manifest* is not served, but the bundle with the manifest *served*."""
    if manifest.id == served.id:
        return f"a copy of {served.name}"
    if manifest.exported_at == served.exported_at:
        return "exported at the same time"

    if manifest.exported_at > served.exported_at:
        return f"not promoted, {served.name} is live"
    return f"exported earlier, {manifest.exported_at[:19]}Z"


def describe_projects(listed: Iterable[ListedBundle]) -> Iterator[tuple[str, bool]]:
    """Yield a line for each project, the served bundle first, and whether one of its bundles is damaged."""
    texts_by_project: dict[str, list[str]] = {}
    damaged_projects = set()
    for bundle in listed:
        project = bundle.path.name if bundle.manifest is None else bundle.manifest.project
        texts = texts_by_project.setdefault(project, [])
        if bundle.is_served and bundle.manifest is not None:
            state = "live, " if bundle.is_live else ""
            texts.insert(
                0,
                f"serves {bundle.path} ({state}exported {bundle.manifest.exported_at[:19]}Z)",
            )
        else:
            texts.append(f"not {bundle.path.name}, {bundle.why_not_served}")

        if bundle.is_damaged:
            damaged_projects.add(project)

    for project, texts in texts_by_project.items():
        yield f"{project}: {'; '.join(texts)}", project in damaged_projects
