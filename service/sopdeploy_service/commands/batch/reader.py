"""Read the bytes of listed images: files, members of tar archives, rows of parquet files, objects of a store.

Each decoder process has its own `Reader`, which keeps the last archive or parquet file open: neighboring
entries of a list are usually in the same one.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any, NamedTuple

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, ImageError
from sopdeploy.files import open_regular, read_at_most

WHOLE = -1  # offset of an image that is a whole file
UNKNOWN = -1  # size of an image that is not known before it is read
PARQUET = ".parquet"
ROWS_PER_READ = 64
LOCAL = "file"  # the protocol of the file system of this machine
IMAGE_COLUMNS = ("bytes", "image")  # the second one as Hugging Face writes it: {bytes, path}


class Entry(NamedTuple):
    """One image of a list.

    *path* is its name in the output. *location* is the file or URL with its bytes; *offset* is a position in
    bytes in a tar archive, a row number in a parquet file, or `WHOLE`. *size* is in bytes, or `UNKNOWN`.
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
        self._rows: ParquetRows | None = None

    def read(self, entry: Entry) -> bytes:
        """Read the bytes of *entry*; raise `ImageError` with the code `unusable_data` if that fails."""
        try:
            if entry.offset == WHOLE:
                with open_location(entry.location) as file:
                    return read_at_most(file, self._limit)
            if self._file is None or entry.location != self._open_location:
                self._file = self._open(entry.location)
            if self._rows is not None:
                return self._rows.read(entry.offset)[: self._limit]
            self._file.seek(entry.offset)
            return read_at_most(self._file, min(entry.size, self._limit))
        except Exception as error:  # object stores and pyarrow raise types of their own
            self.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"cannot be read ({' '.join(reason.split()) or type(error).__name__})"
            raise ImageError(message, code="unusable_data", status=422) from error

    def close(self) -> None:
        """Close the open archive or parquet file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rows, self._open_location = None, None, ""

    def _open(self, location: str) -> IO[bytes]:
        self.close()
        file: IO[bytes] = open_location(location)
        if location.lower().endswith(PARQUET):
            self._rows = ParquetRows(file)
        self._open_location = location
        return file


class ParquetRows:
    """The images of a parquet *file*, read forwards in small batches; reading backwards starts again."""

    def __init__(self, file: IO[bytes]) -> None:
        parquet = import_pyarrow("pyarrow.parquet")
        self._file = parquet.ParquetFile(file, buffer_size=1 << 20)
        groups = range(self._file.metadata.num_row_groups)
        sizes = (self._file.metadata.row_group(group).num_rows for group in groups)
        self._starts = list(accumulate(sizes, initial=0))  # the first row of each group, and the end
        self._column = image_column(self._file.schema_arrow)
        self._batches: Iterator[Any] = iter(())
        self._values: Any = []
        self._group, self._first = -1, 0  # `_first` is the row of the first value

    def read(self, row: int) -> bytes:
        """Read the image of *row*; raises `OSError` if the value is null or the row is missing."""
        if row >= self._starts[-1]:
            raise OSError(f"has no row {row}")
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._batches = self._file.iter_batches(
                ROWS_PER_READ, row_groups=[group], columns=[self._column], use_threads=False
            )
            self._group, self._first, self._values = group, self._starts[group], []
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            self._values = next(self._batches).column(0)
        value = self._values[row - self._first].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise OSError(f"row {row} has no bytes")
        return bytes(content)


def image_column(schema: Any) -> str | None:
    """Find the column of a parquet *schema* with the bytes of images; None if there is none."""
    types = import_pyarrow("pyarrow").types
    for name in (name for name in IMAGE_COLUMNS if name in schema.names):
        kind = schema.field(name).type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return name
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
    return None


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
