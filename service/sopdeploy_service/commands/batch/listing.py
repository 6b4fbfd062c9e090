"""The list of all images of a run, as a parquet file with one row group per part.

A part is a fixed range of the list, so a resumed run writes the same parts as an uninterrupted one. The list
is on disk, because a list of millions of images does not fit into memory.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write
from sopdeploy_service.commands.batch.reader import Entry, import_pyarrow

FILE = "list.parquet"


class Fingerprint(NamedTuple):
    """The number of *images* of a list, and a hash of their names, positions and sizes."""

    images: int
    sha256: str


class Listing:
    """The list in the folder *out*, which is read part by part."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._parquet = import_pyarrow("pyarrow.parquet")
        self._arrow = import_pyarrow("pyarrow")
        self._file: Any = None

    def write(self, entries: Iterable[Entry], part_images: int) -> Fingerprint:
        """Write *entries* in parts of *part_images*."""
        text = self._arrow.string()
        schema = self._arrow.schema(
            [
                ("path", text),
                ("place", self._arrow.binary()),  # a path may not be UTF-8
                ("offset", self._arrow.int64()),
                ("size", self._arrow.int64()),
            ]
        )
        hasher = Hasher()
        with (
            atomic_write(self._path) as partial,
            self._parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
        ):
            watched = hasher.watch(entries)
            while part := list(islice(watched, part_images)):
                writer.write_table(self._arrow.table(_columns(part), schema=schema))
        return hasher.fingerprint()

    def parts(self) -> int:
        """Count the parts."""
        return int(self._opened().metadata.num_row_groups)

    def images_of(self, part: int) -> int:
        """Count the images of *part*."""
        return int(self._opened().metadata.row_group(part).num_rows)

    def read(self, part: int) -> list[Entry]:
        """Read the entries of *part*."""
        return entries_of(self.read_table(part))

    def read_table(self, part: int) -> Any:
        """Read *part* as a table; `entries_of` converts it."""
        return self._opened().read_row_group(part, use_threads=False)

    def _opened(self) -> Any:
        if self._file is None:
            try:
                self._file = self._parquet.ParquetFile(self._path)
            except (OSError, ValueError) as error:  # pyarrow's own error is a ValueError
                raise DataError(f"{self._path}: missing or damaged; choose another --out") from error
        return self._file


def entries_of(table: Any) -> list[Entry]:
    """Convert a *table* of the list to entries."""
    columns = table.to_pydict()
    places = map(os.fsdecode, columns["place"])
    return list(map(Entry, columns["path"], places, columns["offset"], columns["size"]))


def _columns(part: Iterable[Entry]) -> list[tuple[Any, ...]]:
    paths, places, offsets, sizes = zip(*part, strict=True)
    return [tuple(map(printable, paths)), tuple(map(os.fsencode, places)), offsets, sizes]


def printable(path: str) -> str:
    """Replace bytes of *path* that are not UTF-8 by U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


class Hasher:
    """Counts and hashes the entries that pass through `watch`."""

    def __init__(self) -> None:
        self._hash, self._images = hashlib.sha256(), 0

    def watch(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Count and hash *entries*, and yield them unchanged."""
        for entry in entries:
            self._images += 1
            self._hash.update(f"{entry.path}\0{entry.offset} {entry.size}\n".encode(errors="surrogateescape"))
            yield entry

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the entries that `watch` has yielded so far."""
        return Fingerprint(self._images, self._hash.hexdigest())

    @classmethod
    def fingerprint_of(cls, entries: Iterable[Entry]) -> Fingerprint:
        """Return the fingerprint of all *entries*."""
        hasher = cls()
        for _ in hasher.watch(entries):
            pass
        return hasher.fingerprint()
