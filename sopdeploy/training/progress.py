"""What a run tells its onlooker while it goes on; the command line draws bars from it."""

from typing import Protocol

from sopdeploy.training.history import EpochRow


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


class Quiet:
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
