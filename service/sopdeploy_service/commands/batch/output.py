"""The output folder of `sopdeploy classify`: one parquet file per part, and the state of the run.

    OUT/rows/part-00000.parquet     the rows of the first part; a file with its final name is complete
    OUT/_run.json                   what the rows depend on
    OUT/_list.parquet               all images, in the order of the rows
    OUT/_report.html, _report.json  written in the end

Programs that read parquet files from OUT ignore names with an underscore, so they read only the rows.
A run continues only with the same bundle, options, runtime and images, because rows of different runs must
not be mixed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pydantic

from sopdeploy.config import Count, StrictModel
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.files import PARTIAL, atomic_write, writing
from sopdeploy_service.commands.batch.parquet import import_pyarrow

ROWS_FOLDER, STATE, LISTING, PAGE, DATA = "rows", "_run.json", "_list.parquet", "_report.html", "_report.json"
OTHER_FOLDER = "; choose another folder"


class RunState(StrictModel):
    """Everything that the rows of a run depend on; a run continues only if it is unchanged.

    *runtime* includes its version and device; *settings* are those of the decoder.
    """

    format: Literal["sopdeploy-classify"] = "sopdeploy-classify"
    version: Literal[1] = 1
    bundle: str
    runtime: str
    source: str
    num_images: Count
    part_images: Count
    batch: Count
    top_k: Count | None
    logits: bool
    features: bool
    settings: dict[str, str | int]


class OutputFolder:
    """The folder *path* of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parquet = import_pyarrow("pyarrow.parquet")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and reserve it for this process; raise `ConfigError` if another one uses it."""
        with writing(str(self.path), ConfigError):
            (self.path / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another run is writing to {self.path}; wait for it", setting="out"
                ) from error
            self._remove_partial()  # of a run that was killed
            with writing(str(self.path), StorageError):  # errors of sources are no `OSError`
                yield
            self._remove_partial()  # of machines of a Ray cluster that were lost

    def _remove_partial(self) -> None:
        for partial in (*self.path.glob(f"*{PARTIAL}"), *(self.path / ROWS_FOLDER).glob(f"*{PARTIAL}")):
            partial.unlink(missing_ok=True)

    def begin(self, state: RunState) -> None:
        """Write *state*, or compare it with that of the run to continue; raises `ConfigError`."""
        file = self.path / STATE
        if not file.exists():
            if any((self.path / ROWS_FOLDER).iterdir()):
                raise ConfigError(f"{self.path} has rows, but no {STATE}{OTHER_FOLDER}", setting="out")
            with atomic_write(file) as partial:
                partial.write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
                _flush(partial)
            return
        try:
            previous = RunState.model_validate_json(file.read_bytes())
        except pydantic.ValidationError as error:
            raise ConfigError(f"{file}: not written by this version{OTHER_FOLDER}", setting="out") from error
        if previous.source != state.source:
            raise ConfigError(
                f"{self.path} was begun with other images ({previous.num_images:,} then, "
                f"{state.num_images:,} now; "
                f"names and sizes matter, too){OTHER_FOLDER}",
                setting="out",
            )
        for name, value in state:
            if (old := getattr(previous, name)) != value:
                raise ConfigError(
                    f"{self.path} was begun with {name} {old}, not {value}; continue with the same options, "
                    "or choose another folder",
                    setting="out",
                )

    def part(self, number: int) -> Path:
        """Return the file of part *number*."""
        return self.path / ROWS_FOLDER / f"part-{number:05d}.parquet"

    def errors_in(self, number: int, num_images: int) -> int | None:
        """Count the images with an error in part *number*; None if it has not *num_images* rows."""
        try:
            schema = self._parquet.read_metadata(self.part(number))
            errors = int(schema.metadata[b"num_errors"])
        except (OSError, ValueError, KeyError, TypeError):  # pyarrow's own error is a ValueError
            return None
        return errors if schema.num_rows == num_images else None

    def write_part(self, number: int, table: Any) -> None:
        """Write the file of part *number*; it has its final name only when it is complete."""
        with atomic_write(self.part(number), shared=True) as partial:
            self._parquet.write_table(table, partial, compression="zstd", row_group_size=len(table))
            _flush(partial)

    def read_columns(self, number: int, columns: list[str]) -> Any:
        """Read *columns* of part *number* as a table."""
        with self._parquet.ParquetFile(self.part(number)) as file:
            return file.read(columns=columns, use_threads=False)

    def write_text(self, name: str, text: str) -> Path:
        """Write *text* to the file *name* and return its path."""
        with atomic_write(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")
        return self.path / name


def _flush(path: Path) -> None:
    """Make sure that the content of *path* is on the disk before it is renamed."""
    with path.open("rb") as file, suppress(OSError):
        os.fsync(file.fileno())
