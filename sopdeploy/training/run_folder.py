"""The folder of a run: checkpoints and the history.

Without `--out`, runs of a project are numbered: `runs/photos-1`, `runs/photos-2`. The link `runs/latest`
leads to the newest run in `runs` that has a `best.pt`.

`last.pt` is the checkpoint to resume from, `best.pt` the one to export; `history.csv` lists all epochs. Every
file is written atomically. `last.pt` is written first; all other files are derived from it and are written
again when the run is resumed.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import torch

from sopdeploy.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.file_systems import Lock, lock_file
from sopdeploy.files import LOCK, PARTIAL, atomic_write, link_latest, new_folder, writing
from sopdeploy.training.diagnostics import EpochRow, history_csv
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.loop_settings import SaveConfig

RUNS = Path("runs")


def numbered_folder(name: str, strategy: Strategy, *, resume: bool) -> Path:
    """Choose `runs/<name>-<number>`: the newest one to *resume*, if there is one, otherwise the next one."""
    number = 0
    if strategy.rank == 0:  # the sum below passes its choice to the other processes
        pattern = re.compile(rf"{re.escape(name)}-([1-9][0-9]*)")
        matches = [pattern.fullmatch(path.name) for path in RUNS.iterdir()] if RUNS.is_dir() else []
        last = max((int(match[1]) for match in matches if match), default=0)
        number = last if resume and last else last + 1
    return RUNS / f"{name}-{int(strategy.all_reduce(torch.tensor(number)))}"


class RunFolder:
    """The folder of a run; it is created with the first checkpoint."""

    def __init__(self, path: Path, strategy: Strategy) -> None:
        self.path, self.strategy = path, strategy
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.history = path / "history.csv"
        self.saved_at = time.monotonic()
        self._lock: Lock | None = None
        self._created = ExitStack()  # removes the folders that `lock` created, if they are empty

    def lock(self, *, is_resumed: bool = False) -> None:
        """Create the folder and lock it until `unlock`; raise `ConfigError` if another process trains there.

        For a new run, this repeats `check_new`: by now, another process may have trained there. The first
        process holds the lock; the system releases it when this process ends in any way. Loader processes,
        which may live a few seconds longer, do not inherit it.
        """
        path, is_free = self.path / LOCK, True
        if self.strategy.rank == 0:
            with ExitStack() as created:
                with writing(path):
                    created.enter_context(new_folder(self.path))
                    try:
                        self._lock = lock_file(path, of_process=True)
                    except BlockingIOError:
                        is_free = False
                if self._lock is not None:
                    self._lock.warn_if_unlocked(self.path, "train only one network in this folder at a time")
                    self._created = created.pop_all()
                    if not is_resumed:
                        self.check_new()
        if int(self.strategy.all_reduce(torch.tensor(int(is_free)))) != self.strategy.world:
            raise ConfigError(
                f"{self.path}: another process trains in this folder; wait for its end or choose another",
                setting="out",
            )

    def unlock(self) -> None:
        """Release the lock, if this process holds it; empty folders that `lock` created are removed."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink()  # before another process can lock it
            os.close(self._lock.file)
            self._created.close()

    def open(self, *, resume: bool | Literal["auto"]) -> Checkpoint | None:
        """Lock the folder and read `last.pt` to *resume*; for a new run, `check_new` and return None.

        The caller locks the folder of a new run before it writes. Raises `ConfigError` if there is no run to
        resume.
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

        Raises `ConfigError` if it has files or is none, `StorageError` if nothing can be written there.
        """
        if self.last.exists():
            raise ConfigError(
                f"{self.path} holds a run; continue it or choose another folder",
                setting="out",
                remedies={"resume": "always"},
            )
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        # A run that was killed before its first checkpoint may have left the lock file and partial files.
        others = {name for name in names - {LOCK} if not name.endswith(PARTIAL)}
        is_no_folder = os.path.lexists(self.path) and not self.path.is_dir()
        if others or is_no_folder:
            raise ConfigError(f"{self.path} exists and is not an empty folder; choose another", setting="out")
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            message = f"{self.path} cannot be written in {nearest}; choose another"
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
        """Write `best.pt`."""
        self._write(self.best, checkpoint)

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
