"""The list of all images of a run, as a parquet file with one row group per part.

A part is a fixed range of the list, so a resumed run writes the same parts as an uninterrupted one. The list
is on disk, because a list of millions of images does not fit into memory.
"""

import hashlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from sopdeploy_service.commands.batch.parquet import import_pyarrow
from sopdeploy_service.commands.batch.reader import ListedImage


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
    remaining, num_images, digest = iter(entries), 0, hashlib.sha256()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while part := list(islice(remaining, part_images)):
            num_images += len(part)
            for entry in part:
                line = f"{entry.path}\0{entry.offset} {entry.size}\n"
                digest.update(line.encode(errors="surrogateescape"))
            paths, locations, offsets, sizes = zip(*part, strict=True)
            printable = [os.fsencode(path).decode("utf-8", "replace") for path in paths]
            columns = [printable, list(map(os.fsencode, locations)), offsets, sizes]
            writer.write_table(arrow.table(columns, schema=schema))
    return digest.hexdigest(), num_images
