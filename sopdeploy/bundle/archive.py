"""Bundles as archives: one tar file with exactly one valid byte sequence.

The manifest is the first entry and determines the rest: the other files sorted by name, as plain files with
mode 0644, no owner and time 0. The reader does not parse tar. It computes each expected header and compares
bytes, so links, paths, devices, long names, duplicates and trailing data are rejected. Archives of equal
bundles are equal.

Archives are stored in folders, and in stores that fsspec opens, such as S3 and the Hugging Face Hub. Stores
are not trusted: an archive is checked by its hashes, and by a signature if one is required.
"""

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.bundle.folder import MANIFEST, MAX_MANIFEST_BYTES, Bundle, check_file_name
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, MissingPackageError
from sopdeploy.files import BLOCK_BYTES, atomic_write, writing

ARCHIVE_SUFFIX = ".tar"
MAX_ARCHIVE_BYTES = 8_000_000_000
BLOCK = 512
END = bytes(2 * BLOCK)
SIZE_FIELD = slice(124, 136)  # of a tar header, an octal number


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


def put(file: Path, destination: str, name: str) -> str:
    """Copy *file* to *destination*, a folder or its URL, under *name*; return the new location.

    Readers never see an incomplete file under *name*. A failure leaves no new folder.
    """
    if "://" in destination:
        target = f"{destination.rstrip('/')}/{name}"
        with _filesystem(target) as (store, path):
            store.put_file(str(file), path)
        return target
    folder = Path(destination)
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with writing(folder / name, BundleError):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as partial:
                shutil.copyfile(file, partial)
        except OSError:
            with suppress(OSError):
                for parent in new:
                    parent.rmdir()
            raise
    return str(folder / name)


def get(source: str, file: Path, limit: int) -> None:
    """Copy *source*, a path or URL, to *file*; raise `BundleError` if it is larger than *limit* bytes."""
    if "://" in source:
        with _filesystem(source) as (store, path), store.open(path, "rb") as remote:
            _copy(remote, file, source, limit)
        return
    if not Path(source).is_file():
        problem = "a folder" if Path(source).is_dir() else "no such file"
        raise BundleError(f"{source}: {problem}; give the path of the .tar file that `push` wrote")
    with Path(source).open("rb") as local:
        _copy(local, file, source, limit)


def _copy(source: IO[bytes] | BinaryIO, file: Path, name: str, limit: int) -> None:
    """Copy *source* to *file*; raise `BundleError` naming *name* if it exceeds *limit* bytes."""
    size = 0
    with file.open("wb") as target:
        while block := source.read(BLOCK_BYTES):
            size += len(block)
            if size > limit:
                raise BundleError(f"{name}: larger than {limit} bytes, the limit; check the address")
            target.write(block)


@contextmanager
def _filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the fsspec file system of *url* and the path in it.

    Errors become `BundleError`; the clients of stores raise types of several libraries.
    """
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[s3]", MissingPackageError, url)
    try:
        yield fsspec.core.url_to_fs(url)
    except BundleError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # clients wrap errors of uploads
        text = " ".join(str(cause).split())
        raise BundleError(
            f"{url}: {type(cause).__name__}: {text}; check the address, the network and the credentials"
        ) from error
