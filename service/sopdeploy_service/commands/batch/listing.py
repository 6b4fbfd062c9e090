"""The list of all images of a run, as a parquet file with one row group per part.

A part is a fixed range of the list, so a resumed run writes the same parts as an uninterrupted one. The list
is on disk, because a list of millions of images does not fit into memory.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write
from sopdeploy_service.commands.batch.reader import Entry, import_pyarrow

FILE = "_list.parquet"


class Fingerprint:
    """The number of `images` of a list, and a hash of their names, positions and sizes."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.images, self._hash = 0, hashlib.sha256()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Count and hash *entry*."""
        self.images += 1
        self._hash.update(f"{entry.path}\0{entry.offset} {entry.size}\n".encode(errors="surrogateescape"))

    @property
    def sha256(self) -> str:
        """The hash of all entries so far."""
        return self._hash.hexdigest()


class Listing:
    """The list in the folder *out*, which is read part by part."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._parquet = import_pyarrow("pyarrow.parquet")
        self._arrow = import_pyarrow("pyarrow")

    def write(self, entries: Iterable[Entry], part_images: int) -> Fingerprint:
        """Write *entries* in parts of *part_images*."""
        text, number = self._arrow.string(), self._arrow.int64()
        location = self._arrow.binary()  # a path may not be UTF-8
        schema = self._arrow.schema(
            [("path", text), ("location", location), ("offset", number), ("size", number)]
        )
        fingerprint, entries = Fingerprint(), iter(entries)
        with (
            atomic_write(self._path) as partial,
            self._parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
        ):
            while part := list(islice(entries, part_images)):
                for entry in part:
                    fingerprint.add(entry)
                paths, locations, offsets, sizes = zip(*part, strict=True)
                columns = [list(map(printable, paths)), list(map(os.fsencode, locations)), offsets, sizes]
                writer.write_table(self._arrow.table(columns, schema=schema))
        return fingerprint

    def parts(self) -> int:
        """Count the parts."""
        return int(self._file.metadata.num_row_groups)

    def images_of(self, part: int) -> int:
        """Count the images of *part*."""
        return int(self._file.metadata.row_group(part).num_rows)

    def read(self, part: int) -> list[Entry]:
        """Read the entries of *part*."""
        columns = self._file.read_row_group(part, use_threads=False).to_pydict()
        locations = map(os.fsdecode, columns["location"])
        return list(map(Entry, columns["path"], locations, columns["offset"], columns["size"]))

    @cached_property
    def _file(self) -> Any:
        try:
            return self._parquet.ParquetFile(self._path)
        except (OSError, ValueError) as error:  # pyarrow's own error is a ValueError
            raise DataError(f"{self._path}: missing or damaged; choose another folder") from error


def printable(path: str) -> str:
    """Replace bytes of *path* that are not UTF-8 by U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")
