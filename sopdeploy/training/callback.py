"""The events of a run, for the progress display and for users."""

from sopdeploy.training.diagnostics import EpochRow


class Callback:
    """Base class of callbacks; every method does nothing.

    Epochs and steps count from 0. An exception raised by a callback ends the run.
    """

    def on_message(self, message: str) -> None:
        """Receive a line about the start of the run: weights, procedure, images."""

    def on_warning(self, warning: str) -> None:
        """Receive a one-line warning; the run continues."""

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Receive the progress of a procedure without epochs: *done* of *total* parts, in the step *name*."""

    def on_step_end(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        """Run after *step* of the *steps* steps of *epoch*; *loss* is the mean over its samples."""

    def on_evaluation_batch(self, *, epoch: int, epochs: int, done: int) -> None:
        """Run after each evaluation batch; *done* is the number of held-out images evaluated so far."""

    def on_epoch_end(self, row: EpochRow) -> None:
        """Run after each epoch with its metrics."""
