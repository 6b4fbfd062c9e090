"""Open bundles: folders that carry an exported network to the service.

docs/bundle.md describes the format. Opening checks in a fixed order: manifest schema, all paths,
all sizes, all hashes. File contents are parsed only after that. Does not import torch.

A bundle is read once: `Bundle` holds the very bytes that were hashed. Whoever exchanges a file
in the folder later, even a moment after it was read, changes nothing that runs.
"""

import logging
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sopdeploy.base.files import (
    GRAPH,
    GRAPH_DATA,
    MANIFEST,
    POINTER,
    POINTER_ADVICE,
    is_pointer,
    open_regular,
    os_reason,
    read_at_most,
    target_of,
)
from sopdeploy.base.names import read_labels
from sopdeploy.bundle.manifest import CERTIFICATE, FileRecord, Manifest
from sopdeploy.bundle.sealed import HashedBlocks, SealedFile
from sopdeploy.errors import BundleError
from sopdeploy.paths import describe_wrong

PROBES = "probes.npz"
CARD = "README.md"
REQUIRED = (GRAPH, "labels.json", CERTIFICATE, "parity.json", "precision.json", PROBES)
MAX_MANIFEST_BYTES = 4_000_000
MAX_JSON_BYTES = 16_000_000  # of any other JSON file
MAX_CONTENT_BYTES = 512_000_000  # of all files but those of the graph, which are in memory
SIGNATURE_SUFFIX = ".sig"  # of the file beside a bundle or an archive
MAX_NAME_BYTES = 255  # limit of common file systems

log = logging.getLogger("sopdeploy.bundle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle as it was read: the bytes that have the sizes and hashes of the manifest.

    `path` is where it was read, for messages and for what lies beside it; nothing reads the
    files there again. `contents` has the bytes of the files by name, except the graph and its weights.
    `graph` is None if the graph was hashed only, or is in a runtime already. `weights` are its
    weights if they do not fit into its file.
    """

    path: Path
    manifest: Manifest
    labels: tuple[str, ...]
    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    graph: SealedFile | None = field(default=None, repr=False)
    weights: SealedFile | None = field(default=None, repr=False)

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

    def blocks(self, name: str) -> Iterable[bytes]:
        """Return the content of the file *name* in parts; raises `ValueError` if the bundle was read without it."""
        if name not in self.manifest.graph_files:
            return [self.contents[name]]
        if name == GRAPH:
            return self.onnx.blocks()
        if self.weights is None:
            raise ValueError(f"{self.path / name}: was hashed, but not kept")
        return self.weights.blocks()

    def reduced(self) -> "Bundle":
        """Return the bundle with only the files that a server shows, which frees the memory of its other files."""
        shown = {
            name: self.contents[name] for name in (CARD, CERTIFICATE) if name in self.contents
        }
        return replace(self, contents=shown, graph=None, weights=None)


def follow_link(path: Path) -> Path:
    """Return where *path* leads now, through no other link: `latest` to the newest bundle, `live` to the live one.

    The links mean the same in every command. Any other path stays as it is.
    """
    return path.parent / target_of(link=path, path=path) if path.is_symlink() else path


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle folder *path*; raise `BundleError` if it is missing or invalid."""
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file() or file.is_symlink():
        raise BundleError(f"{path}: {describe_wrong(path, 'bundle')}")

    with open_regular(file) as stream:
        content = read_at_most(stream, MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{file}: larger than {MAX_MANIFEST_BYTES} bytes, not a manifest; "
            "copy or export the bundle again"
        )

    if content.startswith(POINTER):
        raise BundleError(f"{file}: {POINTER_ADVICE}")
    try:
        return Manifest.from_bytes(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: {error}; copy or export the bundle again") from error


def open_bundle(path: str | Path, *, with_graph: bool = True) -> Bundle:
    """Check and read the bundle at *path*, a folder or a link to one.

    Raises `BundleError` that names the first file whose path, size or hash differs from the
    manifest.
    """
    target = follow_link(Path(path))
    return read_files(target, read_manifest(target), with_graph=with_graph)


def read_files(path: Path, manifest: Manifest, *, with_graph: bool = True) -> Bundle:
    """Read the files of *manifest* in the folder *path*, each once, and compare their hashes.

    Without *with_graph*, the graph and its weights are hashed and not kept. Raises `BundleError` for the first file
    whose path, size or hash differs.
    """
    _check_names_and_sizes(path, manifest)  # before anything is opened

    # The folder is opened once, so that no other one can take its name meanwhile.
    contents: dict[str, bytes] = {}
    sealed: dict[str, SealedFile] = {}
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
                with _open_hashed(folder, current, record) as blocks:
                    if name not in manifest.graph_files:
                        contents[name] = b"".join(blocks)
                    elif with_graph:
                        sealed[name] = SealedFile(blocks)
                    else:
                        deque(blocks, maxlen=0)  # hash without keeping
    except OSError as error:
        problem = f"cannot be read ({os_reason(error)})"
        if isinstance(error, FileNotFoundError):
            problem = "missing"
        raise BundleError(f"{current}: {problem}; copy or export the bundle again") from error

    labels = _parse_labels(path / "labels.json", contents["labels.json"], manifest)
    return Bundle(
        path=path,
        manifest=manifest,
        labels=labels,
        contents=contents,
        graph=sealed.get(GRAPH),
        weights=sealed.get(GRAPH_DATA),
    )


def _check_names_and_sizes(path: Path, manifest: Manifest) -> None:
    """Raise `BundleError` unless *manifest* of the folder *path* can be that of a bundle.

    It must list plain file names, the `REQUIRED` files, and, beside the graph, at most
    `MAX_CONTENT_BYTES` in all.
    """
    for name in manifest.files:
        check_file_name(path, name)

    for required in REQUIRED:
        if required not in manifest.files:
            raise BundleError(
                f"{path}: the manifest lists no {required}; export the bundle again"
            )

    total = sum(
        record.bytes
        for name, record in manifest.files.items()
        if name not in manifest.graph_files
    )
    if total > MAX_CONTENT_BYTES:
        raise BundleError(
            f"{path}: its files are larger than {MAX_CONTENT_BYTES} bytes; export it again"
        )


@contextmanager
def _open_hashed(folder: int, file: Path, record: FileRecord) -> Iterator[HashedBlocks]:
    """Open *file* in the open *folder* for the block, which reads it once.

    Raises `BundleError` if its type, its size or, at the end, its hash is not that of *record*.
    """
    # By now, it may be a link or a FIFO.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(file.name, flags, dir_fd=folder)

    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        _check_type_and_size(file, os.fstat(stream.fileno()), record)
        blocks = HashedBlocks(stream, record.bytes)
        yield blocks

        if blocks.sha256 != record.sha256:
            raise BundleError(
                f"{file}: its sha256 is not the one in the manifest; the file was damaged: "
                "copy or export the bundle again"
            )


def _check_type_and_size(file: Path, status: os.stat_result, record: FileRecord) -> None:
    """Raise `BundleError` if *file* is not a plain file of the size in *record*, or JSON that is too large."""
    if not stat.S_ISREG(status.st_mode):
        kind = "a pipe or a device"
        if stat.S_ISLNK(status.st_mode):
            kind = "a link"
        elif stat.S_ISDIR(status.st_mode):
            kind = "a folder"
        raise BundleError(
            f"{file}: is {kind}; a bundle has plain files only: copy or export it again"
        )

    if status.st_size != record.bytes and is_pointer(file):
        raise BundleError(f"{file}: {POINTER_ADVICE}")
    if status.st_size != record.bytes:
        raise BundleError(
            f"{file}: has {status.st_size} bytes, but the manifest says {record.bytes}; "
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
            f"{bundle}: the manifest names {name!r}, which is not a plain "
            "file name; export the bundle again"
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
