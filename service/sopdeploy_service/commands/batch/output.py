"""The output folder of `sopdeploy classify`: one parquet file per part of the list of images.

    OUT/rows/part-00000.parquet     the rows of the first part; a file with its final name is complete
    OUT/_list.parquet               all images in the order of the rows, one row group per part
    OUT/_run.json                   what the rows depend on

Programs that read parquet files from OUT ignore names with an underscore, so they read only the rows. A part
is a fixed range of the list, so a resumed run writes the same parts as an uninterrupted one.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sopdeploy.errors import ConfigError
from sopdeploy.files import PARTIAL, atomic_write, writing
from sopdeploy_service.commands.batch.sources import ListedImage

ROWS_FOLDER, LISTING, STATE = "rows", "_list.parquet", "_run.json"
_TEXT, _NUMBER = pa.string(), pa.int64()
LIST_SCHEMA = pa.schema({"path": _TEXT, "location": _TEXT, "offset": _NUMBER, "size": _NUMBER})


class OutputFolder:
    """The folder *path* of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and reserve it for this process; raise `ConfigError` if another one uses it."""
        with writing(str(self.path)):
            (self.path / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                message = f"another run is writing to {self.path}; wait for it"
                raise ConfigError(message, setting="out") from error
            # An `OSError` in the caller's block is also one of this folder: reading an image raises others.
            with writing(str(self.path)):
                self._remove_partial()
                yield
                self._remove_partial()

    def _remove_partial(self) -> None:
        """Remove what killed processes left: those of an earlier run, and lost machines of a Ray cluster."""
        for partial in self.path.rglob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)

    def begin(self, images: Iterable[ListedImage], part_images: int, state: Mapping[str, Any]) -> None:
        """Write the list of *images* in parts of *part_images*, and *state*, what the rows depend on.

        Raises `ConfigError` if the folder belongs to a run with other images or another state: rows of
        different runs must not be mixed.
        """
        with atomic_write(self.path / LISTING) as partial:
            now = {**state, "part_images": part_images, "images": _write_list(partial, images, part_images)}
            before = {}
            with suppress(OSError, ValueError, TypeError):  # no file, or a damaged one
                before = dict(json.loads((self.path / STATE).read_bytes()))
            # Rows without a readable state are those of an unknown run, which differs in every value.
            belongs_to_run = bool(before) or any((self.path / ROWS_FOLDER).iterdir())
            different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            if belongs_to_run and different:
                name = different[0]
                begun = f"{self.path} was begun with {name} {before.get(name)}, not {now.get(name)}"
                advice = "continue with the same images and options, or choose another folder"
                raise ConfigError(f"{begun}; {advice}", setting="out")  # `atomic_write` keeps the old list
        with atomic_write(self.path / STATE) as partial:
            partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")

    def sizes(self) -> list[int]:
        """Return the number of images in each part."""
        metadata = pq.read_metadata(self.path / LISTING)
        return [metadata.row_group(part).num_rows for part in range(metadata.num_row_groups)]

    def images(self, part: int) -> list[ListedImage]:
        """Read *part* of the list."""
        with pq.ParquetFile(self.path / LISTING) as file:
            columns = file.read_row_group(part, columns=LIST_SCHEMA.names).to_pydict().values()
            return list(map(ListedImage, *columns))

    def num_errors(self, part: int, size: int) -> int | None:
        """Count the images with an error in *part*; None if its file does not have *size* rows yet."""
        try:
            errors = pq.read_table(self._file(part), columns=["error"])["error"]
        except (OSError, ValueError):  # pyarrow's own error is a ValueError
            return None
        return len(errors) - int(errors.null_count) if len(errors) == size else None

    def write(self, part: int, rows: Sequence[Mapping[str, Any]], schema: Any) -> None:
        """Write the *rows* of *part*; its file has its final name only when it is complete."""
        table = pa.Table.from_pylist(rows, schema=schema)
        with atomic_write(self._file(part), shared=True) as partial:
            pq.write_table(table, partial, compression="zstd")

    def _file(self, part: int) -> Path:
        return self.path / ROWS_FOLDER / f"part-{part:05d}.parquet"


def _write_list(file: Path, images: Iterable[ListedImage], part_images: int) -> str:
    """Write *images* to *file*; return their number and a hash of their names, positions and sizes."""
    remaining, count, digest = iter(images), 0, hashlib.sha256()
    with pq.ParquetWriter(file, LIST_SCHEMA, compression="zstd") as writer:
        while part := list(islice(remaining, part_images)):
            count += len(part)
            for image in part:
                digest.update(f"{image.path}\0{image.offset} {image.size}\n".encode())
            columns = [list(values) for values in zip(*part, strict=True)]
            writer.write_table(pa.table(columns, schema=LIST_SCHEMA))
    return f"{count} ({digest.hexdigest()[:16]})"
