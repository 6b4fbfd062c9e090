"""The output folder of `sopdeploy classify`: one parquet file per part of the list of images.

    OUT/rows/part-00000.parquet    the rows of the first part
    OUT/_list.parquet              all images in the order of the rows, one row group per part
    OUT/_run.json                  what the rows depend on

A file with its final name is complete. Programs that read parquet files from OUT ignore names
with an underscore, so they read only the rows. A part is a fixed range of the list, so a
resumed run writes the same parts as an uninterrupted one.

`RunState` and the columns are format 1: a later version may add optional fields and columns,
and each file names the version of sopdeploy that wrote it.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sopdeploy.base.config import (
    OtherVersionError,
    StrictModel,
    check_is_readable,
    parse_json,
    validate_format,
    writer_of,
)
from sopdeploy.base.file_systems import lock_file
from sopdeploy.base.files import (
    LOCK,
    MAX_TEXT_BYTES,
    PARTIAL,
    atomic_write,
    new_folder,
    read_file,
    remove_leftovers,
    writing,
)
from sopdeploy.errors import ConfigError
from sopdeploy.version import __version__
from sopdeploy_commands.classify.sources import ListedImage
from sopdeploy_commands.tables import LISTING, ROWS_FOLDER, STATE, VERSION, make_schema

PART_IMAGES = 512  # by default; a killed run begins the last part again
_TEXT = pa.string()
_NUMBER = pa.int64()


LIST_SCHEMA = make_schema(
    {"path": _TEXT, "location": _TEXT, "offset": _NUMBER, "size": _NUMBER}
)


class RowsState(StrictModel):
    """What the rows of a run depend on, besides its images.

    Attributes:
        bundle: ID of the bundle.
        runtime: Name and device of the runtime.
        batch: Images in a batch.
        top_k: Classes of a row; None: all above their threshold.
    """

    bundle: str
    runtime: str
    batch: int
    top_k: int | None
    columns: tuple[str, ...]
    max_body_bytes: int
    max_pixels: int


class RunState(RowsState):
    """Content of `_run.json`.

    Attributes:
        written_by: Version of sopdeploy that wrote the file last.
        part_images: Images of a part.
        images: Number of images, and a hash of their names, positions and sizes.
    """

    version: Literal[1] = VERSION
    written_by: str = __version__
    part_images: int
    images: str

    def difference(self, other: "RunState | None") -> str:
        """Describe the first field that differs in *other*, or return ""; `written_by` may differ.

        If *other* is None, the first field differs.
        """
        here = self.model_dump(mode="json", exclude={"written_by"})
        there = {} if other is None else other.model_dump(mode="json")
        name = next((name for name in sorted(here) if there.get(name) != here[name]), None)
        return "" if name is None else f"{name} {there.get(name)}, not {here[name]}"


class OutputFolder:
    """The folder *path* of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and reserve it for this process in the block.

        If the block ends without `begin`, what was created is removed again. Raises
        `ConfigError` if another process uses the folder. If its file system has no locks, a
        line warns not to start a second run, which would write the same rows again.
        """
        with ExitStack() as created:
            with writing(self.path):
                # This removes the folder at the end if this run created it and left it empty.
                created.enter_context(new_folder(self.path))
                try:
                    lock = lock_file(self.path / LOCK)
                except BlockingIOError as error:
                    message = f"another run is writing to {self.path}; wait for it"
                    raise ConfigError(message, setting="out") from error

            lock.warn_if_unlocked(
                self.path, "start no second run with this folder before this one has ended"
            )
            created.callback(os.close, lock.file)
            created.callback(self._remove_lock_unless_begun)

            # An `OSError` in the caller's block is one of this folder, too: an image that cannot be
            # read raises other errors.
            with writing(self.path):
                created.enter_context(new_folder(self.path / ROWS_FOLDER))
                self._remove_partial(is_locked=not lock.failure)
                yield
                self._remove_partial(is_locked=not lock.failure)

    def _remove_lock_unless_begun(self) -> None:
        if {path.name for path in self.path.iterdir()} <= {LOCK, ROWS_FOLDER}:
            (self.path / LOCK).unlink(missing_ok=True)

    def _remove_partial(self, *, is_locked: bool) -> None:
        """Remove temporary files of killed processes, also of lost machines of a Ray cluster.

        Unless the folder *is_locked*, another run may still write some of them; then only those
        are removed whose processes have surely ended.
        """
        for folder in (self.path, self.path / ROWS_FOLDER):
            remove_leftovers(folder)
        for name in (LISTING, STATE, f"{ROWS_FOLDER}/part-*.parquet") if is_locked else ():
            for partial in self.path.glob(f"{name}.*{PARTIAL}"):
                partial.unlink(missing_ok=True)

    def begin(
        self, images: Iterable[ListedImage], part_images: int | None, state: RowsState
    ) -> None:
        """Write the list of *images* in parts of *part_images*, and *state*.

        If *part_images* is None, it is that of the run that the folder holds, or `PART_IMAGES`.
        Raises `ConfigError` if the folder belongs to another run: rows of different runs must
        not be mixed.
        """
        before = self._read_state()
        size = part_images or (PART_IMAGES if before is None else before.part_images)

        with atomic_write(self.path / LISTING, durable=True) as partial:
            hashed = _write_list(partial, images, size)
            now = RunState(**state.model_dump(), part_images=size, images=hashed)

            belongs_to_run = before is not None or any((self.path / ROWS_FOLDER).iterdir())
            if belongs_to_run and (difference := now.difference(before)):
                advice = "continue with the same images and options, or choose another folder"
                message = f"{self.path} was begun with {difference}; {advice}"
                raise ConfigError(message, setting="out")  # `atomic_write` keeps the old list
        with atomic_write(self.path / STATE, durable=True) as partial:
            partial.write_text(now.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _read_state(self) -> RunState | None:
        """Read `_run.json`; None if it is missing or damaged; raises `ConfigError` for another format."""
        path = self.path / STATE
        try:
            fields = parse_json(read_file(path, MAX_TEXT_BYTES))
            check_is_readable(writer_of(fields), "choose another folder")
            return validate_format(RunState, fields)
        except OtherVersionError as error:
            raise ConfigError(f"{path}: {error}", setting="out") from error
        except (OSError, ValueError):
            return None

    def sizes(self) -> list[int]:
        """Return the number of images in each part."""
        metadata = pq.read_metadata(self.path / LISTING)
        return [metadata.row_group(part).num_rows for part in range(metadata.num_row_groups)]

    def images(self, part: int) -> list[ListedImage]:
        """Read *part* of the list."""
        with pq.ParquetFile(self.path / LISTING) as file:
            columns = file.read_row_group(part, columns=LIST_SCHEMA.names).to_pydict().values()
            return list(map(ListedImage, *columns))

    def is_written(self, part: int, size: int) -> bool:
        """Check whether *part* has its *size* rows, so that a run need not classify it again."""
        return self.num_errors(part, size) is not None

    def num_errors(self, part: int, size: int) -> int | None:
        """Count the images with an error in *part*; None if its file does not have *size* rows yet."""
        try:
            errors = pq.read_table(self._file(part), columns=["error"])["error"]
        except (OSError, ValueError):  # pyarrow's own error is a ValueError
            return None
        return len(errors) - int(errors.null_count) if len(errors) == size else None

    def write(self, part: int, rows: Sequence[Mapping[str, object]], schema: Any) -> None:
        """Write the *rows* of *part*; its file has its final name only when it is complete."""
        table = pa.Table.from_pylist(rows, schema=schema)
        with atomic_write(self._file(part), durable=True) as partial:
            pq.write_table(table, partial, compression="zstd")

    def _file(self, part: int) -> Path:
        return self.path / ROWS_FOLDER / f"part-{part:05d}.parquet"


def _write_list(file: Path, images: Iterable[ListedImage], part_images: int) -> str:
    """Write *images* to *file*; return their number and a hash of their names, positions and sizes."""
    remaining = iter(images)
    count = 0
    digest = hashlib.sha256()
    with pq.ParquetWriter(file, LIST_SCHEMA, compression="zstd") as writer:
        while part := list(islice(remaining, part_images)):
            count += len(part)
            for image in part:
                digest.update(f"{image.path}\0{image.offset} {image.size}\n".encode())

            columns = [list(values) for values in zip(*part, strict=True)]
            writer.write_table(pa.table(columns, schema=LIST_SCHEMA))
    return f"{count} ({digest.hexdigest()[:16]})"
