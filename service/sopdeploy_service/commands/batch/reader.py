"""Read the bytes of listed images: files, members of tar archives, rows of parquet files, objects of a store.

Each decoder process has its own `Reader`, which keeps the last archive or parquet file open: neighboring
entries of a list are usually in the same one.
"""

from typing import IO, Any, NamedTuple

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, ImageError
from sopdeploy.files import open_regular, read_at_most
from sopdeploy_service.commands.batch.parquet import PARQUET, ParquetImages

WHOLE = -1  # offset of an image that is a whole file
UNKNOWN = -1  # size of an image that is not known before it is read
LOCAL = "file"  # the protocol of the file system of this machine


class ListedImage(NamedTuple):
    """One image of a list.

    *path* is its name in the output. *location* is the file or URL with its bytes; *offset* is a position in
    bytes in a tar archive, a row of a parquet file, or `WHOLE`. *size* is in bytes, or `UNKNOWN`; for a row
    it is that of all images of its row group.
    """

    path: str
    location: str
    offset: int = WHOLE
    size: int = UNKNOWN


class Reader:
    """Reads entries, at most *max_bytes* + 1 bytes of each: enough to reject a larger image."""

    def __init__(self, max_bytes: int) -> None:
        self._limit = max_bytes + 1
        self._open_location = ""
        self._file: IO[bytes] | None = None
        self._rows: ParquetImages | None = None

    def read(self, entry: ListedImage) -> bytes:
        """Read the bytes of *entry*; raise `ImageError` with the code `unusable_data` if that fails."""
        try:
            if entry.offset == WHOLE:
                with open_location(entry.location) as file:
                    return read_at_most(file, self._limit)
            if self._file is None or entry.location != self._open_location:
                self.close()
                self._file, self._open_location = open_location(entry.location), entry.location
                if is_parquet(entry.location):
                    self._rows = ParquetImages(self._file)
            if self._rows is not None:
                return self._rows.read(entry.offset, self._limit)
            self._file.seek(entry.offset)
            return read_at_most(self._file, min(entry.size, self._limit))
        except Exception as error:  # object stores raise types of their own
            if self._rows is None:  # it remembers a damaged row group
                self.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"cannot be read ({' '.join(reason.split()) or type(error).__name__})"
            raise ImageError(message, code="unusable_data", status=422) from error

    def close(self) -> None:
        """Close the open archive or parquet file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rows, self._open_location = None, None, ""


def open_location(location: str) -> Any:
    """Open the regular file or URL *location*; raises `OSError` or an error of the object store."""
    if is_url(location):
        store, path = open_store(location)
        # `file://` is a store, too, whose `open` waits for a writer of a named pipe
        return open_regular(path, buffering=0) if LOCAL in store.protocol else store.open(path, "rb")
    return open_regular(location, buffering=0)


def is_parquet(location: str) -> bool:
    """Tell whether *location* is a parquet file, by its name."""
    return location.lower().endswith(PARQUET)


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
