"""The folder of a run: `last.pt` to go on from, `best.pt` to export, `history.csv` to read.

`previous.pt` is the `last.pt` before, `epoch-0010.pt` one that was kept. Each is written whole or not at all,
`last.pt` first: what follows from it is written again when the run is resumed.
"""

import os
import shutil
import time
from pathlib import Path

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.files import PARTIAL, atomic_write
from sopdeploy.training.distributed.strategy import Parallel
from sopdeploy.training.history import history_csv
from sopdeploy.training.recipe import SaveChoice
from sopdeploy.training.run import Run

MINUTE = 60.0


class RunFolder:
    """Where a run is kept; it appears with the first checkpoint, never empty or half written.

    `warning` says on one line where `previous.pt` had to stand in for a damaged `last.pt`.
    """

    def __init__(self, path: Path, parallel: Parallel) -> None:
        self.path, self.parallel = path, parallel
        self.last = path / "last.pt"
        self.previous = path / "previous.pt"
        self.best = path / "best.pt"
        self.history = path / "history.csv"
        self.warning: str | None = None
        self.saved_at = time.monotonic()
        self.last_is_whole = False

    def holds_run(self) -> bool:
        """Say whether there is something to resume."""
        return self.last.exists() or self.previous.exists()

    def must_be_free(self) -> None:
        """Raise `ConfigError` unless a new run can be written here; what was left half written is nothing."""
        if self.holds_run():
            raise ConfigError(f"{self.path}: holds a run; go on with --resume or choose another --out")
        if self.path.exists() and not (self.path.is_dir() and all(map(is_partial, self.path.iterdir()))):
            raise ConfigError(f"{self.path}: exists and is no empty folder; choose another --out")
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"{self.path}: cannot be created in {nearest}; choose another --out")

    def read_last(self) -> tuple[Checkpoint, Path]:
        """Return the checkpoint to go on from and its file; raises `ConfigError` where there is none.

        Where `last.pt` cannot be read it is `previous.pt`, and `warning` says so.
        """
        if not self.holds_run():
            raise ConfigError(f"{self.path}: holds no run to resume; leave --resume out to begin one here")
        try:
            checkpoint = self.parallel.load(self.last)
        except CheckpointError as problem:
            if not self.previous.exists():
                raise
            checkpoint = self.parallel.load(self.previous)
            self.warning = f"{problem}; going on from {self.previous}"
            return checkpoint, self.previous
        self.last_is_whole = True
        return checkpoint, self.last

    def is_due(self, choice: SaveChoice, step: int) -> bool:
        """Say whether the recipe wants a checkpoint after *step* steps of the epoch."""
        waited = time.monotonic() - self.saved_at
        by_time = choice.every_minutes > 0 and waited >= choice.every_minutes * MINUTE
        return by_time or (choice.every_steps > 0 and step % choice.every_steps == 0)

    def save_last(self, run: Run) -> None:
        """Write the state of a run that is anywhere between two steps."""
        checkpoint = run.checkpoint(resumable=True)
        if self.last_is_whole and self.parallel.rank == 0:
            second_name(self.last, self.previous)
        self.parallel.save(self.last, checkpoint)
        self.last_is_whole = True
        self.saved_at = time.monotonic()

    def save_epoch(self, run: Run) -> None:
        """Write what a finished epoch leaves."""
        self.save_last(run)
        self.save_consequences(run)

    def save_consequences(self, run: Run) -> None:
        """Write what follows from `last.pt`: the history, and after an epoch `best.pt` and the kept one.

        A resumed run does it first: it may have been killed before, and its history may be longer than its
        checkpoint's.
        """
        if run.at.step == 0 and run.is_best():
            self.parallel.save(self.best, run.checkpoint(resumable=False))
        if self.parallel.rank != 0:
            return
        every = run.recipe.save.keep_every
        if every and run.at.step == 0 and run.at.epoch and run.at.epoch % every == 0 and self.last.exists():
            second_name(self.last, self.path / f"epoch-{run.at.epoch:04}.pt")
        if run.at.history:
            self.write_history(history_csv(run.at.history))

    def write_history(self, table: str) -> None:
        """Replace `history.csv`."""
        try:
            with atomic_write(self.history) as partial:
                partial.write_text(table, encoding="utf-8")
        except OSError as problem:
            raise CheckpointError(f"{self.history}: cannot be written ({problem.strerror})") from problem


def is_partial(path: Path) -> bool:
    """Say whether *path* is a file that a kill left half written."""
    return path.name.endswith(PARTIAL)


def second_name(path: Path, name: Path) -> None:
    """Give the file *path* a second *name*, which keeps it when the first gets a new file.

    Where the file system has no such links it is copied.
    """
    try:
        with atomic_write(name) as partial:
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
    except OSError as problem:
        raise CheckpointError(f"{name}: cannot be written ({problem.strerror})") from problem
