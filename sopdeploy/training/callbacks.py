"""Callbacks that observe a run, such as the progress display."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sopdeploy.data.base import Split
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.start_weights import StartReport

if TYPE_CHECKING:
    from sopdeploy.training.run import Run


class Callback:
    """Base class of callbacks; every method does nothing.

    Epochs and steps count from 0. An exception raised by a callback ends the run.
    """

    def on_train_start(
        self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int, input_side: int
    ) -> None:
        """Run once before the first step; *first_epoch* is above 0 in a resumed run."""

    def on_start_weights(self, report: StartReport) -> None:
        """Receive the report on the start weights of a new run, before `on_train_start`."""

    def on_warning(self, warning: str) -> None:
        """Receive a one-line warning; the run continues."""

    def on_procedure(self, reason: str) -> None:
        """Receive which procedure was selected, why, and the expected time."""

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Receive the progress of a procedure without epochs: *done* of *total* parts, in the step *name*."""

    def on_step_end(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Run after *step* of the *steps* steps of *epoch*; *loss* is the mean over its samples."""

    def on_evaluation_batch(self, *, epoch: int, done: int) -> None:
        """Run after each evaluation batch; *done* is the number of held-out images evaluated so far."""

    def on_epoch_end(self, row: EpochRow) -> None:
        """Run after each epoch with its metrics."""

    def on_train_end(self, *, run: "Run", data: Split) -> None:
        """Run once after the last epoch, when `best.pt` is complete."""


class CallbackList(Callback):
    """Forward every event to several callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        def forward(event: str, *arguments: Any, **values: Any) -> None:
            for callback in callbacks:
                getattr(callback, event)(*arguments, **values)

        for name in vars(Callback):
            if name.startswith("on_"):
                setattr(self, name, partial(forward, name))
