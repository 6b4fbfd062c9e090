"""The folder of a run: checkpoints and the history.

Without `--out`, runs of a recipe are numbered: `runs/photos-1`, `runs/photos-2`. The link `runs/latest` leads
to the newest run in `runs` that has a `best.pt`.

`last.pt` is the checkpoint to resume from and `previous.pt` the one before it, `best.pt` the one to export,
`epoch-0010.pt` a kept one; `history.csv` lists all epochs. Every file is written atomically. `last.pt` is
written first; all other files are derived from it and are written again when the run is resumed.
"""

import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch

from sopdeploy.checkpoint import Checkpoint, read_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.files import PARTIAL, atomic_write, link_latest, writing
from sopdeploy.training.callbacks import TENSORBOARD_FOLDER, WANDB_FILE
from sopdeploy.training.diagnostics import best_epoch, history_csv
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.recipe import SaveConfig
from sopdeploy.training.run import Run

LOCK_FILE = ".lock"  # remains after a run was killed, without a lock
RUNS = Path("runs")
RESTARTABLE = {LOCK_FILE, TENSORBOARD_FOLDER, WANDB_FILE}  # written before a checkpoint


def numbered_folder(name: str, strategy: Strategy, *, resume: bool) -> Path:
    """Choose `runs/<name>-<number>`: the newest one to *resume*, otherwise the next one.

    A run that was stopped before its first checkpoint leaves no run to resume; its folder is used again.
    """
    number = 0
    if strategy.rank == 0:  # the other processes adopt its choice
        pattern = re.compile(rf"{re.escape(name)}-([1-9][0-9]*)")
        names = [path.name for path in RUNS.iterdir()] if RUNS.is_dir() else []
        last = max((int(found[1]) for found in map(pattern.fullmatch, names) if found), default=0)
        again = last > 0 and (resume or RunFolder(RUNS / f"{name}-{last}", strategy).is_free())
        number = last if again else last + 1
    return RUNS / f"{name}-{int(strategy.all_reduce(torch.tensor(number)))}"


class RunFolder:
    """The folder of a run; it is created with the first checkpoint.

    `warning` is set if `previous.pt` replaces a damaged `last.pt`.
    """

    def __init__(self, path: Path, strategy: Strategy) -> None:
        self.path, self.strategy = path, strategy
        self.last = path / "last.pt"
        self.previous = path / "previous.pt"
        self.best = path / "best.pt"
        self.history = path / "history.csv"
        self.warning: str | None = None
        self.saved_at = time.monotonic()
        self._last_is_valid = False
        self._lock: int | None = None
        self._created = False

    def lock(self) -> None:
        """Create the folder and lock it until `unlock`; raise `ConfigError` if another process trains there.

        The first process holds the lock; the system releases it when this process ends in any way. Loader
        processes, which may live a few seconds longer, do not inherit it.
        """
        free = self.strategy.rank != 0 or self._try_lock()
        if int(self.strategy.all_reduce(torch.tensor(int(free)))) != self.strategy.world:
            raise ConfigError(
                f"{self.path}: another process trains in this folder; wait for its end or choose another",
                setting="out",
            )

    def _try_lock(self) -> bool:
        path = self.path / LOCK_FILE
        while True:
            with writing(path, CheckpointError):
                self._created = self._created or not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(self._lock)
                self._lock = None
                return False
            except OSError:  # this file system has no locks
                return True
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(self._lock).st_ino:
                    return True
            os.close(self._lock)  # another run ended and removed the file between the two calls

    def unlock(self) -> None:
        """Release the lock, if this process holds it; an empty folder that `lock` created is removed."""
        if self._lock is None:
            return
        with suppress(OSError):
            (self.path / LOCK_FILE).unlink()
            if self._created:
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None

    def is_free(self) -> bool:
        """Check whether a new run can be written here, and no other process is about to."""
        try:
            self.check_free()
        except ConfigError:
            return False
        if not (self.path / LOCK_FILE).exists():
            return True
        free = self._try_lock()
        self.unlock()
        return free

    def holds_run(self) -> bool:
        """Check whether there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def check_free(self) -> None:
        """Raise `ConfigError` unless a new run can be written here."""
        if self.holds_run():
            raise ConfigError(
                f"{self.path} holds a run; continue it or choose another folder",
                setting="out",
                remedies={"resume": "always"},
            )
        if os.path.lexists(self.path) and not (
            self.path.is_dir() and all(map(_is_restartable, self.path.iterdir()))
        ):
            raise ConfigError(f"{self.path} exists and is not an empty folder; choose another", setting="out")
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"{self.path} cannot be created in {nearest}; choose another", setting="out")

    def read_last(self) -> tuple[Checkpoint, Path]:
        """Lock the folder, read `last.pt`, or `previous.pt` if it is damaged, and return its path too.

        Raises `ConfigError` if there is no checkpoint, `CheckpointError` if none can be read.
        """
        if not self.holds_run():
            raise ConfigError(f"{self.path} holds no run; start one first", setting="resume")
        self.lock()
        try:
            checkpoint = read_checkpoint(self.last)
        except CheckpointError as error:
            if not self.previous.exists():
                raise
            checkpoint = read_checkpoint(self.previous)
            self.warning = f"{error}; resuming from {self.previous}"
            return checkpoint, self.previous
        self._last_is_valid = True
        return checkpoint, self.last

    def is_save_due(self, config: SaveConfig, step: int) -> bool:
        """Check whether the recipe asks for a checkpoint after *step* steps of the epoch."""
        elapsed = time.monotonic() - self.saved_at
        by_time = config.every_minutes > 0 and elapsed >= config.every_minutes * 60
        return by_time or (config.every_steps > 0 and step % config.every_steps == 0)

    def save_last(self, run: Run) -> None:
        """Write `last.pt`; the run may be between any two steps."""
        checkpoint = run.checkpoint(resumable=True)
        if self._last_is_valid and self.strategy.rank == 0:
            _link_or_copy(self.last, self.previous)
        self.strategy.save(self.last, checkpoint)
        self._last_is_valid = True
        self.saved_at = time.monotonic()

    def save_derived_files(self, run: Run) -> None:
        """Write the history and, after an epoch, `best.pt` and the kept checkpoint.

        A resumed run does this first, because the process may have been killed before it wrote these files.
        """
        at, every = run.position, run.recipe.save.keep_every
        frozen = run.recipe.frozen_backbone
        best = best_epoch(at.history, frozen_backbone=frozen).epoch if at.history else None
        if at.step == 0 and best == at.epoch:
            self.strategy.save(self.best, run.checkpoint(resumable=False))
        if self.strategy.rank != 0:
            return
        if every and at.step == 0 and at.epoch and at.epoch % every == 0:
            saved = self.last if self._last_is_valid else self.previous
            _link_or_copy(saved, self.path / f"epoch-{at.epoch:04}.pt")
        if at.history:
            with writing(self.history, CheckpointError), atomic_write(self.history) as partial:
                partial.write_text(history_csv(at.history), encoding="utf-8")
            if self.path.absolute().parent == RUNS.absolute():
                with writing(self.path.parent, CheckpointError):
                    link_latest(self.path)


def _is_restartable(file: Path) -> bool:
    """Check whether *file* is one that a run leaves behind before its first checkpoint."""
    return file.name.endswith(PARTIAL) or file.name in RESTARTABLE


def _link_or_copy(path: Path, name: Path) -> None:
    """Create *name* as a hard link to *path*, or as a copy."""
    with writing(name, CheckpointError), atomic_write(name) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
