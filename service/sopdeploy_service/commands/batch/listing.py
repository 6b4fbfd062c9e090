"""The list of all images of a run, a parquet file with one row group per part, and the bytes of the images.

A part is a fixed range of the list, so a resumed run writes the same parts as an uninterrupted one. The list
is on disk, because a list of millions of images does not fit into memory. The bytes are those of files,
members of tar archives, or objects of a store.
"""

import hashlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, ImageError
from sopdeploy.files import open_regular, read_at_most

WHOLE = -1  # offset of an image that is a whole file
UNKNOWN = -1  # size of an image that is not known before it is read
LOCAL = "file"  # the protocol of the file system of this machine


class ListedImage(NamedTuple):
    """One image of a list.

    *path* is its name in the output. *location* is the file or URL with its bytes; *offset* is a position in
    bytes in a tar archive, or `WHOLE`. *size* is in bytes, or `UNKNOWN`.
    """

    path: str
    location: str
    offset: int = WHOLE
    size: int = UNKNOWN


class Reader:
    """Reads entries, at most *max_bytes* + 1 bytes of each: enough to reject a larger image.

    It keeps the last archive open: neighboring entries of a list are usually in the same one.
    """

    def __init__(self, max_bytes: int) -> None:
        self._limit = max_bytes + 1
        self._open_location = ""
        self._file: IO[bytes] | None = None

    def read(self, entry: ListedImage) -> bytes:
        """Read the bytes of *entry*; raise `ImageError` with the code `unusable_data` if that fails."""
        try:
            if entry.offset == WHOLE:
                with open_location(entry.location) as file:
                    return read_at_most(file, self._limit)
            if self._file is None or entry.location != self._open_location:
                self.close()
                self._file, self._open_location = open_location(entry.location), entry.location
            self._file.seek(entry.offset)
            return read_at_most(self._file, min(entry.size, self._limit))
        except Exception as error:  # object stores raise types of their own
            self.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"cannot be read ({' '.join(reason.split()) or type(error).__name__})"
            raise ImageError(message, code="unusable_data", status=422) from error

    def close(self) -> None:
        """Close the open archive."""
        if self._file is not None:
            self._file.close()
        self._file, self._open_location = None, ""


def import_pyarrow(module: str) -> Any:
    """Import a *module* of pyarrow; raise `ConfigError` if it is not installed."""
    return import_optional(module, "pyarrow", "sopdeploy[batch]", ConfigError, "classify")


def open_location(location: str) -> Any:
    """Open the regular file or URL *location*; raises `OSError` or an error of the object store."""
    if is_url(location):
        store, path = open_store(location)
        # `file://` is a store, too, whose `open` waits for a writer of a named pipe
        return open_regular(path, buffering=0) if LOCAL in store.protocol else store.open(path, "rb")
    return open_regular(location, buffering=0)


def is_url(location: str) -> bool:
    """Tell whether *location* is a URL and not a path."""
    return "://" in location


def open_store(url: str) -> tuple[Any, str]:
    """Open the object store of *url* with fsspec; return it and the path in it.

    Raises `ConfigError` if fsspec or the package for such URLs is not installed.
    """
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[batch,s3]", ConfigError, url)
    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: cannot be opened ({' '.join(str(error).split())}); check the address and the credentials"
        ) from error
    return store, path


class Listing:
    """The list in *file*, which is read part by part."""

    def __init__(self, file: Path) -> None:
        self._file = import_pyarrow("pyarrow.parquet").ParquetFile(file)

    def num_parts(self) -> int:
        """Count the parts."""
        return int(self._file.metadata.num_row_groups)

    def images_of(self, part: int) -> int:
        """Count the images of *part*."""
        return int(self._file.metadata.row_group(part).num_rows)

    def read(self, part: int) -> list[ListedImage]:
        """Read the entries of *part*."""
        columns = self._file.read_row_group(part, use_threads=False).to_pydict()
        locations = map(os.fsdecode, columns["location"])
        return list(map(ListedImage, columns["path"], locations, columns["offset"], columns["size"]))


def write_list(file: Path, entries: Iterable[ListedImage], part_images: int) -> tuple[str, int]:
    """Write *entries* to *file* in parts of *part_images*.

    Returns a hash of their names, positions and sizes, and their number.
    """
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    schema = arrow.schema(
        {
            "path": arrow.string(),
            "location": arrow.binary(),  # a path may not be UTF-8
            "offset": arrow.int64(),
            "size": arrow.int64(),
        }
    )
    remaining, images, digest = iter(entries), 0, hashlib.sha256()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while part := list(islice(remaining, part_images)):
            images += len(part)
            for entry in part:
                line = f"{entry.path}\0{entry.offset} {entry.size}\n"
                digest.update(line.encode(errors="surrogateescape"))
            paths, locations, offsets, sizes = zip(*part, strict=True)
            printable = [os.fsencode(path).decode("utf-8", "replace") for path in paths]
            columns = [printable, list(map(os.fsencode, locations)), offsets, sizes]
            writer.write_table(arrow.table(columns, schema=schema))
    return digest.hexdigest(), images
