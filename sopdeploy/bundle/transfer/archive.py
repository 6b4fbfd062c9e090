"""A bundle as one file: a tar that has exactly one form, so that nothing else is ever unpacked.

The manifest comes first and fixes all that follows: the other files by name, each a plain file of mode 0644,
of nobody, from 1970. A reader therefore parses no tar. It computes the headers that must be there and
compares bytes: there is no room for a link, a path, a device, a long name, a second file of one name or
anything behind the end. Two archives of one bundle are equal, whoever wrote them.
"""

import shutil
import tarfile
from pathlib import Path
from typing import BinaryIO

from sopdeploy.bundle.folder import MANIFEST, MAX_MANIFEST_BYTES, READ_BYTES, Bundle, check_name
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError

BLOCK = 512
END = bytes(2 * BLOCK)
SIZE = slice(124, 136)  # of a tar header: an octal number


def write_archive(bundle: Bundle, file: BinaryIO) -> None:
    """Write the archive of *bundle* to *file*; raises `BundleError` for a name that tar has no room for."""
    raw = bundle.manifest.to_bytes()
    file.write(header(MANIFEST, len(raw)) + raw + padding(len(raw)))
    for name, record in sorted(bundle.manifest.files.items()):
        file.write(header(name, record.bytes))
        with (bundle.path / name).open("rb") as content:
            shutil.copyfileobj(content, file, READ_BYTES)
        file.write(padding(record.bytes))
    file.write(END)


def archived_manifest(archive: Path) -> Manifest:
    """Return the manifest that *archive* begins with, after looking at the size of the whole.

    Raises `BundleError` where it is not the archive of a bundle.
    """
    try:
        with archive.open("rb") as file:
            first = file.read(BLOCK)
            size = octal(first[SIZE])
            if size > MAX_MANIFEST_BYTES or first != header(MANIFEST, size):
                raise ValueError("does not begin with a manifest")
            raw = file.read(size)
        manifest = Manifest.from_bytes(raw)
    except (ValueError, RecursionError) as problem:
        raise BundleError(f"{archive.name}: not an archive of `sopdeploy push` ({problem})") from problem
    if archive.stat().st_size != archive_bytes(manifest):
        raise BundleError(
            f"{archive.name}: has {archive.stat().st_size} bytes, its manifest says "
            f"{archive_bytes(manifest)}; push the bundle again"
        )
    return manifest


def unpack(archive: Path, manifest: Manifest, folder: Path) -> None:
    """Write the files of *archive*, which begins with *manifest*, into the empty *folder*.

    Contents are not looked at: `open_bundle` compares their hashes. Raises `BundleError` where the archive
    is not, but for contents, byte for byte what `write_archive` gives.
    """
    raw = manifest.to_bytes()
    (folder / MANIFEST).write_bytes(raw)
    with archive.open("rb") as file:
        file.seek(BLOCK + len(raw))
        expect(file, padding(len(raw)), MANIFEST)
        for name, record in sorted(manifest.files.items()):
            check_name(Path(archive.name), name)
            if name.casefold() == MANIFEST:
                raise BundleError(f"{archive.name}: its manifest lists {name!r}, which would replace itself")
            expect(file, header(name, record.bytes), name)
            copy(file, folder / name, record.bytes)
            expect(file, padding(record.bytes), name)
        expect(file, END, "its end")


def expect(file: BinaryIO, wanted: bytes, name: str) -> None:
    """Read from *file* as many bytes as are *wanted*, and refuse others."""
    if file.read(len(wanted)) != wanted:
        raise BundleError(f"{Path(file.name).name}: {name!r} is not packed as `sopdeploy push` packs it")


def copy(source: BinaryIO, target: Path, size: int) -> None:
    """Write the next *size* bytes of *source* to *target*, a new file."""
    try:
        with target.open("xb") as file:
            while size > 0 and (block := source.read(min(size, READ_BYTES))):
                file.write(block)
                size -= len(block)
    except OSError as problem:
        raise BundleError(f"{target.name}: cannot be written ({problem.strerror})") from problem


def archive_bytes(manifest: Manifest) -> int:
    """Return how long the archive of the bundle with *manifest* is."""
    sizes = [len(manifest.to_bytes()), *(record.bytes for record in manifest.files.values())]
    return sum(BLOCK + size + len(padding(size)) for size in sizes) + len(END)


def header(name: str, size: int) -> bytes:
    """Return the tar header (USTAR) of a plain file; raises `BundleError` where one block cannot hold it."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as problem:
        raise BundleError(f"{name!r}: does not fit into an archive ({problem})") from problem


def padding(size: int) -> bytes:
    """Return the zeros that follow *size* bytes, up to the next block."""
    return bytes(-size % BLOCK)


def octal(field: bytes) -> int:
    """Return the number in a *field* of a header; raises `ValueError`."""
    digits = field.rstrip(b"\0 ")
    if not digits or digits.strip(b"01234567"):
        raise ValueError("does not begin as a tar")
    return int(digits, 8)
