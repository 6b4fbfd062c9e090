"""The events of a run, for the progress display and for users."""

import time
from collections.abc import Callable, Iterable

from sopdeploy.training.diagnostics import EpochRow

MEASURED_SECONDS = 10.0  # from the first part on
WORTH_A_LINE = 120.0  # seconds of the rest


class Callback:
    """Base class of callbacks; every method does nothing.

    The arguments *epoch* and *step* count from 0. An exception raised by a callback ends the
    run.
    """

    def on_message(self, message: str) -> None:
        """Receive a line about the run: weights, procedure, images, or the expected time."""

    def on_warning(self, warning: str) -> None:
        """Receive a one-line warning; the run continues."""

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Receive the progress of a procedure without epochs: *done* of *total* parts, in the step *name*."""

    def on_step_end(
        self, *, epoch: int, epochs: int, step: int, steps: int, loss: float
    ) -> None:
        """Run after *step* of the *steps* steps of *epoch*; *loss* is the mean over its samples."""

    def on_evaluation_batch(self, *, epoch: int, epochs: int, done: int) -> None:
        """Run after each evaluation batch; *done* is the number of held-out images evaluated so far."""

    def on_epoch_end(self, row: EpochRow) -> None:
        """Run after each epoch with its metrics."""


class ForwardingCallback(Callback):
    """Passes all events on to *callback*; a subclass adds to some of them."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def on_message(self, message: str) -> None:
        """Pass the *message* on."""
        self.callback.on_message(message)

    def on_warning(self, warning: str) -> None:
        """Pass the *warning* on."""
        self.callback.on_warning(warning)

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Pass the progress on."""
        self.callback.on_stage(name=name, done=done, total=total)

    def on_step_end(
        self, *, epoch: int, epochs: int, step: int, steps: int, loss: float
    ) -> None:
        """Pass the step on."""
        self.callback.on_step_end(epoch=epoch, epochs=epochs, step=step, steps=steps, loss=loss)

    def on_evaluation_batch(self, *, epoch: int, epochs: int, done: int) -> None:
        """Pass the progress on."""
        self.callback.on_evaluation_batch(epoch=epoch, epochs=epochs, done=done)

    def on_epoch_end(self, row: EpochRow) -> None:
        """Pass the *row* on."""
        self.callback.on_epoch_end(row)


class WarningRecord(ForwardingCallback):
    """Passes each warning on once, and keeps the `warnings` for the result of the run."""

    def __init__(self, callback: Callback) -> None:
        super().__init__(callback)
        self.warnings: list[str] = []
        self.told: set[str] = set()

    def keep(self, warnings: Iterable[str]) -> None:
        """Keep the *warnings* of the part of the run before, which were told then."""
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def on_warning(self, warning: str) -> None:
        """Keep the *warning*, and pass it on if it was not told yet."""
        self.keep([warning])
        if warning not in self.told:
            self.told.add(warning)
            self.callback.on_warning(warning)


class ExpectedTime:
    """Tells *callback*, at most once, how long the rest of a run takes, measured on its first parts.

    A rest of less than `WORTH_A_LINE` is not told. *advice* is the end of the line: how to
    choose another procedure. *clock* returns seconds.
    """

    def __init__(
        self, callback: Callback, advice: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.callback = callback
        self.advice = advice
        self.clock = clock
        self.first_at: float | None = None  # when the first part was done
        self.first_done = 0  # parts that were done then
        self.is_measured = False

    def update(self, done: int, total: int) -> None:
        """Receive that *done* of *total* parts, images or steps, are done; may send the message."""
        if self.first_at is None:  # the first part is slower than the others
            self.first_at = self.clock()
            self.first_done = done

        seconds = self.clock() - self.first_at
        measured = done - self.first_done
        if self.is_measured or seconds < MEASURED_SECONDS or measured == 0:
            return
        self.is_measured = True

        remaining = seconds / measured * (total - done)
        if remaining >= WORTH_A_LINE:
            duration = f"{remaining / 60:.0f} minutes"
            if remaining >= 2 * 3600:
                duration = f"{remaining / 3600:.1f} hours"
            self.callback.on_message(f"expected time: about {duration}; {self.advice}")
