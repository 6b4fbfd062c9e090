"""Images in a column of a parquet file: bytes, as of Ray Data, or structs {bytes, path}, as of Hugging Face.

Pages of a column have no limit of their own, and the dictionary of a row group is one page. Reading a row may
therefore need the memory of its row group twice, so the size of row groups is limited before they are read.
"""

import resource
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError

PARQUET = ".parquet"
MAX_ROW_GROUP = 1 << 30  # bytes of the images of a row group, without compression
_PREFERRED = ("image", "image.bytes")  # if there are several columns of bytes
_BUFFER = 1 << 16
_SLACK = 1 << 26  # bytes for the objects of a read besides its pages


class ParquetImages:
    """The images in an open parquet *file*, which are read in order within a row group.

    Raises `ValueError` unless it has one column of bytes, and what pyarrow raises for a damaged file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        parquet = import_pyarrow("pyarrow.parquet")
        self._file = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        self._column, self._path = _image_column(self._file.schema)
        groups = [self._file.metadata.row_group(group) for group in range(self._file.metadata.num_row_groups)]
        self._first_rows = [0, *accumulate(group.num_rows for group in groups)]
        self._group, self._next_row = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._error: Exception | None = None

    def sizes(self) -> Iterator[int]:
        """Yield for each row the compressed size of the images of its row group."""
        for group in range(len(self._first_rows) - 1):
            size = int(self._chunk(group).total_compressed_size)
            yield from (size for _ in range(self._first_rows[group], self._first_rows[group + 1]))

    def read(self, row: int, limit: int) -> bytes:
        """Read at most *limit* bytes of the image in *row*.

        Raises `ValueError` for a cell without bytes and for a row group above `MAX_ROW_GROUP`. An error of
        pyarrow is raised for later rows of the row group, too: it does not depend on where reading begins.
        """
        group = bisect_right(self._first_rows, row) - 1
        if group != self._group or row < self._next_row:
            self._batches, self._error = self._read_group(group), None
            self._group, self._next_row = group, self._first_rows[group]
        if self._error is not None:
            raise self._error
        try:
            while self._next_row <= row:
                with _memory_limit(self._chunk(group)):
                    batch = next(self._batches)
                self._next_row += 1
        except Exception as error:
            self._error = error
            raise
        cell = batch.column(0)[0]
        while cell.is_valid and hasattr(cell, "keys"):  # a struct of one selected field
            (cell,) = cell.values()
        if not cell.is_valid:
            raise ValueError("the cell has no bytes")
        return bytes(memoryview(cell.as_buffer())[:limit])

    def _chunk(self, group: int) -> Any:
        return self._file.metadata.row_group(group).column(self._column)

    def _read_group(self, group: int) -> Iterator[Any]:
        """Yield the rows of *group*, each as a batch."""
        size = self._chunk(group).total_uncompressed_size
        if size > MAX_ROW_GROUP:
            raise ValueError(
                f"its row group has {size:,} bytes of images, more than {MAX_ROW_GROUP:,}"
                "; write smaller row groups, for example of 100 rows"
            )
        yield from self._file.iter_batches(1, row_groups=[group], columns=[self._path], use_threads=False)
        raise ValueError("its row group has fewer rows than the file states")


def import_pyarrow(module: str) -> Any:
    """Import a *module* of pyarrow; raise `ConfigError` if it is not installed."""
    return import_optional(module, "pyarrow", "sopdeploy[batch]", ConfigError, "classify")


def _image_column(schema: Any) -> tuple[int, str]:
    """Find the number and the path of the column of encoded images."""
    columns = [schema.column(index) for index in range(len(schema))]
    found = {
        column.path: index
        for index, column in enumerate(columns)
        if column.physical_type == "BYTE_ARRAY" and str(column.logical_type) == "None"
        if column.max_repetition_level == 0 and column.name in {column.path, "bytes"}
    }
    chosen = list(found) if len(found) == 1 else [path for path in _PREFERRED if path in found]
    if not chosen:
        names = f" ({', '.join(found)}); name one of them image" if found else ""
        raise ValueError(f"it needs one column with the bytes of encoded images, but has {len(found)}{names}")
    return found[chosen[0]], chosen[0]


@contextmanager
def _memory_limit(chunk: Any) -> Iterator[None]:
    """Let a read fail that needs more memory than *chunk* states: a forged page may expand to 2 GiB."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[5]) * resource.getpagesize()
    limit = used + 3 * max(chunk.total_uncompressed_size, chunk.total_compressed_size) + _SLACK
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
