"""What a run tells its onlooker while it goes on; the command line draws bars from it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy.training.history import EpochRow, table_row


class Progress(Protocol):
    """Told of a run's way; epochs and steps count from 0. What it raises ends the run."""

    def started(self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int) -> None:
        """Tell how long the run is; *first_epoch* is above 0 where it was resumed."""

    def warned(self, warning: str) -> None:
        """Tell what is not as it should be, on one line, though the run goes on."""

    def stepped(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Tell that one of an epoch's *steps* is done; *loss* is that of its batch."""

    def measured(self, *, epoch: int, done: int) -> None:
        """Tell how many held-out pictures of this epoch are done."""

    def finished_epoch(self, row: EpochRow) -> None:
        """Tell what an epoch gave."""


class NullCallback:
    """The onlooker who is told everything and says nothing."""

    def started(self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int) -> None:
        """Say nothing."""

    def warned(self, warning: str) -> None:
        """Say nothing."""

    def stepped(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Say nothing."""

    def measured(self, *, epoch: int, done: int) -> None:
        """Say nothing."""

    def finished_epoch(self, row: EpochRow) -> None:
        """Say nothing."""


AMONG = {"top1": "held_out", "top5": "held_out", "loss": "held_out", "lr": "course", "gradient": "course"}


class TensorBoard(NullCallback):
    """Writes event files into the folder `tensorboard` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.make = logger("torch.utils.tensorboard", "tensorboard", "sopdeploy[tensorboard]").SummaryWriter
        self.writer: Any = None

    def started(self, **facts: int) -> None:
        """Open the event file; what an older one has of epochs that are still to come is forgotten."""
        self.writer = self.make(str(self.folder), purge_step=facts["first_epoch"] + 1)

    def finished_epoch(self, row: EpochRow) -> None:
        """Write one scalar per figure."""
        for name, value in grouped(row).items():
            self.writer.add_scalar(name, value, row.epoch)
        self.writer.flush()


class WeightsAndBiases(NullCallback):
    """Sends figures to Weights & Biases, as its own environment variables say; one run per folder."""

    def __init__(self, folder: Path) -> None:
        self.wandb = logger("wandb", "wandb", "wandb")
        self.folder = folder
        self.run: Any = None

    def started(self, **facts: int) -> None:
        """Open the run, the same one again where this is a resumed run."""
        self.run = self.wandb.init(name=self.folder.name, id=self.folder.name, resume="allow", config=facts)

    def finished_epoch(self, row: EpochRow) -> None:
        """Send the figures of an epoch."""
        self.run.log(grouped(row), step=row.epoch)


LOGGERS: dict[str, Callable[[Path], Progress]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class CallbackList:
    """Tells several onlookers the same, in order."""

    def __init__(self, onlookers: Sequence[Progress]) -> None:
        self.onlookers = onlookers

    def started(self, **facts: int) -> None:
        """Tell all of them how long the run is."""
        for one in self.onlookers:
            one.started(**facts)

    def warned(self, warning: str) -> None:
        """Tell all of them what is not as it should be."""
        for one in self.onlookers:
            one.warned(warning)

    def stepped(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Tell all of them of a step."""
        for one in self.onlookers:
            one.stepped(epoch=epoch, step=step, steps=steps, loss=loss)

    def measured(self, *, epoch: int, done: int) -> None:
        """Tell all of them of pictures measured."""
        for one in self.onlookers:
            one.measured(epoch=epoch, done=done)

    def finished_epoch(self, row: EpochRow) -> None:
        """Tell all of them what an epoch gave."""
        for one in self.onlookers:
            one.finished_epoch(row)


def loggers(names: Sequence[str], folder: Path) -> list[Progress]:
    """Return the loggers *names* for the run in *folder*; raises `ConfigError` for one that is not here."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"--log {name}: none of {', '.join(LOGGERS)}")
    return [LOGGERS[name](folder) for name in names]


def grouped(row: EpochRow) -> dict[str, float]:
    """Return every figure of *row* under `group/name`, as boards sort them."""
    found = {name: value for name, value in table_row(row).items() if name != "epoch"}
    return {f"{group(name)}/{name.removeprefix('train_')}": value for name, value in found.items()}


def group(name: str) -> str:
    """Return the group of a column of `history.csv`."""
    if name.startswith("train_"):
        return "train"
    return AMONG.get(name, "heads" if name.endswith(("_top1", "_loss", "_imbalance")) else "course")


def logger(module: str, package: str, source: str) -> Any:
    """Return the *module* of *package*, which `--log` names; raises `ConfigError` where it is missing."""
    return import_optional(module, package, source, ConfigError, f"--log {package}")
