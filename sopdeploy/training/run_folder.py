"""The folder of a run: `last.pt` to go on from, `best.pt` to export, `history.csv` to read."""

import os
from pathlib import Path

from sopdeploy.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.training.history import history_csv
from sopdeploy.training.run import Run


class RunFolder:
    """Where a run is kept; it appears with the first checkpoint, never empty or half written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.history = path / "history.csv"

    def must_be_free(self) -> None:
        """Raise `ConfigError` unless a new run can be written here."""
        if self.last.exists():
            raise ConfigError(f"{self.path}: holds a run; go on with --resume or choose another --out")
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise ConfigError(f"{self.path}: exists and is no empty folder; choose another --out")
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"{self.path}: cannot be created in {nearest}; choose another --out")

    def read_last(self) -> Checkpoint:
        """Return the checkpoint to go on from; raises `ConfigError` where there is none."""
        if not self.last.exists():
            raise ConfigError(f"{self.path}: holds no run to resume; leave --resume out to begin one here")
        return read_checkpoint(self.last)

    def save_stopped(self, run: Run) -> None:
        """Write the state of a run that was stopped anywhere."""
        write_checkpoint(self.last, run.checkpoint(resumable=True))

    def save_epoch(self, run: Run) -> None:
        """Write what a finished epoch leaves: `best.pt` if it is the best, `last.pt`, `history.csv`.

        `best.pt` comes first: a run killed in between resumes from the older `last.pt` and writes the
        same `best.pt` again.
        """
        if run.is_best():
            write_checkpoint(self.best, run.checkpoint(resumable=False))
        write_checkpoint(self.last, run.checkpoint(resumable=True))
        partial = self.history.with_name(self.history.name + ".partial")
        try:
            partial.write_text(history_csv(run.at.history), encoding="utf-8")
            partial.replace(self.history)
        except OSError as problem:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"{self.history}: cannot be written ({problem.strerror})") from problem
