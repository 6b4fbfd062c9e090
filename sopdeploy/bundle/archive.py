"""Bundles as archives: one tar file with exactly one valid byte sequence.

The manifest is the first entry and determines the rest: the other files sorted by name, as
plain files with mode 0644, no owner and time 0. The reader does not parse tar. It computes each
expected header and compares bytes, so links, paths, devices, long names, duplicates and
trailing data are rejected.

Archives are stored in folders, and in stores that fsspec opens, such as S3 and the Hugging Face
Hub. Stores are not trusted: an archive is checked by its hashes, and by a signature if one is
required.
"""

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.bundle.folder import MAX_MANIFEST_BYTES, Bundle, check_file_name
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.environment import describe_store_error, import_optional, missing_store_error
from sopdeploy.errors import BundleError, MissingPackageError, SopdeployError
from sopdeploy.files import (
    BLOCK_BYTES,
    MANIFEST,
    POINTER_ADVICE,
    STORAGE_ERRNOS,
    atomic_write,
    is_pointer,
    new_folder,
    writing,
)
from sopdeploy.proxies import (
    HTTPX_PROXIES,
    describe_route,
    find_proxy,
    requested_url,
    store_options,
)

ARCHIVE_SUFFIX = ".tar"
MAX_ARCHIVE_BYTES = 8_000_000_000
BLOCK = 512
END = bytes(2 * BLOCK)
SIZE_FIELD = slice(124, 136)  # of a tar header, an octal number


def write_archive(bundle: Bundle, file: BinaryIO) -> None:
    """Write the archive of *bundle* to *file*.

    Raises `BundleError` for a name that does not fit a header, and for a bundle that `pull` would refuse.
    """
    sizes = [len(bundle.manifest.to_bytes())]
    sizes += [record.bytes for record in bundle.manifest.files.values()]
    total = sum(BLOCK + size + len(padding(size)) for size in sizes) + len(END)
    if total > MAX_ARCHIVE_BYTES:
        raise BundleError(
            f"{bundle.path}: its archive would have {total} bytes, and `sopdeploy pull` accepts at most "
            f"{MAX_ARCHIVE_BYTES}; copy the folder in place of an archive"
        )

    for piece in archive_layout(bundle.manifest):
        if isinstance(piece, bytes):
            file.write(piece)
        else:
            file.writelines(bundle.blocks(piece))


def archive_layout(manifest: Manifest) -> Iterator[bytes | str]:
    """Yield what an archive contains: bytes, and names of files where their contents follow."""
    raw = manifest.to_bytes()

    yield header(MANIFEST, len(raw)) + raw + padding(len(raw))
    for name, record in sorted(manifest.files.items()):
        yield header(name, record.bytes)
        yield name
        yield padding(record.bytes)
    yield END


def read_archived_manifest(archive: IO[bytes], name: str) -> Manifest:
    """Read the manifest at the start of *archive*, which errors call *name*; raises `BundleError`."""
    archive.seek(0)

    try:
        first_block = archive.read(BLOCK)
        if not first_block[SIZE_FIELD].rstrip(b"\0 ").isdigit():
            raise ValueError("it is no tar archive")
        size = int(first_block[SIZE_FIELD].rstrip(b"\0 "), 8)
        if not 0 <= size <= MAX_MANIFEST_BYTES or first_block != header(MANIFEST, size):
            raise ValueError("does not begin with a manifest")
        return Manifest.from_bytes(archive.read(size))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{name}: not an archive of `sopdeploy push` ({error}); give the .tar "
            "file that it wrote"
        ) from error


def unpack(archive: IO[bytes], name: str, manifest: Manifest, folder: Path) -> None:
    """Write the files of *archive* into the empty *folder*; *manifest* comes from `read_archived_manifest`.

    Errors call the archive *name*. Raises `BundleError` if anything but file contents differs
    from what `write_archive` writes.
    """
    for file in manifest.files:
        check_file_name(Path(name), file)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())

    # The bytes of an archive follow from its manifest: headers and files in turn, then nothing.
    mismatch = f"{name}: is not packed as `sopdeploy push` packs it; push the bundle again"
    archive.seek(0)
    for piece in archive_layout(manifest):
        if isinstance(piece, str):  # the name of a file, whose contents follow
            missing = manifest.files[piece].bytes
            with (folder / piece).open("xb") as target:
                while missing > 0 and (block := archive.read(min(missing, BLOCK_BYTES))):
                    target.write(block)
                    missing -= len(block)
        elif archive.read(len(piece)) != piece:  # other bytes, or fewer because the file ends
            raise BundleError(mismatch)

    if archive.read(1):  # bytes after the last piece
        raise BundleError(mismatch)


def header(name: str, size: int) -> bytes:
    """Build the USTAR header of a plain file; raise `BundleError` if *name* or *size* does not fit."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise BundleError(
            f"{name!r}: its name or size does not fit into a tar header ({error}); "
            "export the bundle again"
        ) from error


def padding(size: int) -> bytes:
    """Return the zero bytes that fill the last block of a file of *size* bytes."""
    return bytes(-size % BLOCK)


def upload(file: Path, destination: str, name: str) -> str:
    """Copy *file* to *destination*, a folder or its URL, under *name*; return the new location.

    In folders and object stores, readers never see an incomplete file under *name*. A failure
    leaves no new folder.
    """
    folder = destination.removeprefix("file://")
    url = f"{destination.rstrip('/')}/{name}"
    if "://" in folder:
        with _open_store(url) as (store, path):
            store.put_file(str(file), path)
        return url

    target = Path(folder) / name
    with (
        writing(target),
        new_folder(target.parent),
        atomic_write(target, durable=True) as partial,
    ):
        shutil.copyfile(file, partial)
    return str(target) if folder == destination else url


def download(source: str, target: IO[bytes], limit: int, folder: Path) -> None:
    """Copy *source*, a path or URL, to *target*, an open file in *folder*.

    Raises `BundleError` if it does not exist, cannot be read from a store, or is larger than
    *limit* bytes, and `StorageError` if *folder* cannot hold it.
    """
    size = 0

    # A store, or a file of this machine.
    with ExitStack() as stack:
        if "://" in source:
            store, path = stack.enter_context(_open_store(source))
            content = stack.enter_context(store.open(path, "rb"))
        elif is_pointer(Path(source)):
            raise BundleError(f"{source}: {POINTER_ADVICE}")
        elif Path(source).is_file():
            content = stack.enter_context(Path(source).open("rb"))
        else:
            problem = "a folder" if Path(source).is_dir() else "no such file"
            raise BundleError(
                f"{source}: {problem}; give the path of the .tar file that `push` wrote"
            )

        while block := content.read(BLOCK_BYTES):
            size += len(block)
            if size > limit:
                raise BundleError(
                    f"{source}: larger than {limit} bytes, the limit; check the address"
                )
            with writing(folder):
                target.write(block)
                target.flush()


@contextmanager
def _open_store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the fsspec file system of *url* and the path in it; convert the errors of its client."""
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[s3]", MissingPackageError, url)

    try:
        yield fsspec.core.url_to_fs(url, **store_options(url))
    except SopdeployError:
        raise
    except ImportError as error:
        raise missing_store_error(url, error) from error
    except Exception as error:  # the clients of stores raise types of several libraries
        cause = error.__cause__ or error  # clients wrap errors of uploads

        # An error of the system, as of file:// and of mounted disks.
        if isinstance(cause, OSError) and cause.errno in STORAGE_ERRNOS:
            with writing(url):  # converts it to `StorageError`
                raise cause from error

        where = describe_route(url, find_proxy(requested_url(url), HTTPX_PROXIES))
        problem = f"{where}: {describe_store_error(error)}"
        raise BundleError(
            f"{problem}; check the address, the network and the credentials"
        ) from error
