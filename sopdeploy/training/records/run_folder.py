"""The folder of a run and its files.

Without `--out`, runs of a project are numbered: `runs/photos-1`, `runs/photos-2`. The link
`runs/latest` leads to the newest run in `runs` that has a `best.pt`. `last.pt` is the
checkpoint to resume from, `best.pt` the one to export; `history.csv` lists all epochs, and
`run.json` says what lists of runs show. Every file is written atomically. `last.pt` is written
first; all other files are derived from it and are written again when the run is resumed.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import torch

from sopdeploy.base.file_systems import Lock, lock_file
from sopdeploy.base.files import (
    BEST,
    HISTORY,
    LAST,
    LOCK,
    PARTIAL,
    RECIPE,
    SUMMARY,
    atomic_write,
    link_latest,
    new_folder,
    writing,
)
from sopdeploy.base.project import RUNS
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.training.diagnostics import EpochRow, history_csv
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.records.summary import RunSummary
from sopdeploy.training.settings.loop import SaveConfig
from sopdeploy.training.settings.recipe import recipe_file
from sopdeploy.weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

IN_USE = "run_in_use"  # code of the error about a folder in which another process trains


def numbered_folder(name: str, strategy: Strategy, *, resume: bool) -> Path:
    """Choose `runs/<name>-<number>`: with *resume* the newest one, if there is one, otherwise the next one."""
    number = 0
    if strategy.rank == 0:  # the sum below passes its choice to the other processes
        pattern = re.compile(rf"{re.escape(name)}-([1-9][0-9]*)")
        folders = [*RUNS.iterdir()] if RUNS.is_dir() else []
        matches = [pattern.fullmatch(folder.name) for folder in folders]
        last = max((int(match[1]) for match in matches if match), default=0)
        number = last if resume and last else last + 1

    return RUNS / f"{name}-{int(strategy.all_reduce(torch.tensor(number)))}"


class RunFolder:
    """The folder of a run; it is created with the first checkpoint."""

    def __init__(self, path: Path, strategy: Strategy) -> None:
        self.path = path
        self.strategy = strategy
        self.last = path / LAST
        self.best = path / BEST
        self.history = path / HISTORY
        self.saved_at = time.monotonic()
        self._lock: Lock | None = None
        # When it is closed, the folders that `lock` created are removed, if they are empty.
        self._created = ExitStack()

    def lock(self, *, is_resumed: bool = False) -> None:
        """Create the folder and lock it until `unlock`; raise `ConfigError` if another process trains there.

        Unless *is_resumed*, this repeats `check_new`: by now, another process may have trained there.
        The first process holds the lock; the system releases it when this process ends in any
        way. Loader processes, which may live a few seconds longer, do not inherit it.
        """
        path = self.path / LOCK

        # Only the first process holds the lock; the others learn below whether it is free.
        is_free = True
        if self.strategy.rank == 0:
            # If anything fails here, the new folders are removed again.
            with ExitStack() as created:
                with writing(path):
                    created.enter_context(new_folder(self.path))
                    try:
                        self._lock = lock_file(path, of_process=True)
                    except BlockingIOError:
                        is_free = False

                if self._lock is not None:
                    self._lock.warn_if_unlocked(
                        self.path, "train only one network in this folder at a time"
                    )
                    self._created = created.pop_all()

                    if not is_resumed:
                        self.check_new()

        if int(self.strategy.all_reduce(torch.tensor(int(is_free)))) != self.strategy.world:
            raise ConfigError(
                f"{self.path}: another process trains in this folder; wait for its "
                "end or choose another",
                setting="out",
                code=IN_USE,
            )

    def unlock(self) -> None:
        """Release the lock, if this process holds it; empty folders that `lock` created are removed."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink()  # before another process can lock it
            os.close(self._lock.file)
            self._created.close()

    def open(self, *, resume: bool | Literal["auto"]) -> Checkpoint | None:
        """Lock the folder and read `last.pt` to *resume*; return None for a new run.

        "auto" resumes a run if there is one. For a new run, this only checks the folder
        (`check_new`); the caller locks it before it writes. Raises `ConfigError` if there is no
        run to resume, and the errors of `lock`, `check_new` and `read_checkpoint`.
        """
        has_run = self.last.exists()
        if resume is True and not has_run:
            raise ConfigError(f"{self.path} holds no run; start one first", setting="resume")
        if resume and has_run:
            self.lock(is_resumed=True)
            return read_checkpoint(self.last)
        self.check_new()
        return None

    def check_new(self) -> None:
        """Check that a new run can begin in the folder, which may be empty or not exist.

        Raises `ConfigError` if it has files or the path is not a folder, `StorageError` if nothing
        can be written there.
        """
        if self.last.exists():
            raise ConfigError(
                f"{self.path} holds a run; continue it or choose another folder",
                setting="out",
                remedies={"resume": "always"},
            )

        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        # A run that was killed before its first checkpoint may have left the lock file and
        # partial files.
        others = {name for name in names - {LOCK} if not name.endswith(PARTIAL)}

        is_no_folder = os.path.lexists(self.path) and not self.path.is_dir()
        if others or is_no_folder:
            raise ConfigError(
                f"{self.path} exists and is not an empty folder; choose another", setting="out"
            )

        # The nearest folder that exists must be one in which this process can create others.
        nearest = next(
            folder for folder in (self.path, *self.path.absolute().parents) if folder.exists()
        )
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            message = f"{self.path} cannot be created in {nearest}; choose another"
            raise StorageError(message, setting="out")

    def is_save_due(self, config: SaveConfig) -> bool:
        """Check whether the last checkpoint is as old as the recipe allows."""
        elapsed = time.monotonic() - self.saved_at
        return config.every_minutes > 0 and elapsed >= config.every_minutes * 60

    def save_last(self, checkpoint: Checkpoint) -> None:
        """Write `last.pt`; the run may be between any two steps."""
        self._write(self.last, checkpoint)
        self.saved_at = time.monotonic()

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write `best.pt`, the recipe of the run, and `run.json`, which is missing while it may not fit `best.pt`."""
        if self.strategy.rank == 0:
            with writing(self.path):
                (self.path / SUMMARY).unlink(missing_ok=True)
        self._write(self.best, checkpoint)
        if self.strategy.rank == 0:
            recipe = self.path / RECIPE
            with writing(recipe), atomic_write(recipe) as partial:
                partial.write_text(recipe_file(checkpoint.training["recipe"]), encoding="utf-8")
            RunSummary.of(checkpoint.project, checkpoint.origin, checkpoint.training).write(
                self.path
            )

    def _write(self, path: Path, checkpoint: Checkpoint) -> None:
        if self.strategy.rank == 0:
            write_checkpoint(path, checkpoint)

    def save_history(self, history: Sequence[EpochRow]) -> None:
        """Write the history and, in `runs/`, the link `latest`; call it after `save_best`."""
        if self.strategy.rank != 0:
            return

        with writing(self.history), atomic_write(self.history) as partial:
            partial.write_text(history_csv(history), encoding="utf-8")
        if self.path.absolute().parent == RUNS.absolute():
            with writing(self.path.parent):
                link_latest(self.path)
