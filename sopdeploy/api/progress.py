"""Progress of a training run on a terminal or in a notebook."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


def plain_text(text: str) -> Text:
    """Build one line of rich text from *text*, without markup; `?` replaces control characters."""
    line = " ".join(text.split())
    return Text("".join(character if character.isprintable() else "?" for character in line))


class ProgressBars:
    """A training callback that draws a progress bar and prints a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.epochs, self.stage = 0, ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(28),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "ProgressBars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_train_start(
        self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int, input_side: int
    ) -> None:
        """Print the size of the data and of the network's input."""
        self.epochs = epochs
        resumed = f", resumed at epoch {first_epoch + 1}" if first_epoch else ""
        size = f"the network sees {input_side} x {input_side} pixels"
        self.console.print(f"{train_count} training images, {held_out_count} held out{resumed}; {size}")
        self.task = self.progress.add_task("", total=None, note="")

    def on_start_weights(self, report: Any) -> None:
        """Print which tensors are loaded and which parts are new."""
        new = f"; new: {', '.join(report.new)}" if report.new else ""
        unused = f"; not used: {', '.join(report.unused)}" if report.unused else ""
        text = f"start weights: {report.file} ({report.network}), {report.loaded} tensors{new}{unused}"
        self.console.print(plain_text(text))

    def on_warning(self, warning: str) -> None:
        """Print the warning."""
        self.console.print(Text.assemble(("warning:", "yellow"), " ", plain_text(warning)))

    def on_procedure(self, reason: str) -> None:
        """Print the reason."""
        self.console.print(plain_text(reason))

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Advance the bar of a procedure without epochs; print the name of a step when it begins."""
        if name != self.stage:
            self.stage = name
            self.console.print(name)
        if self.task is not None:
            self.progress.update(self.task, description="", completed=done, total=total, note="")

    def on_step_end(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Advance the bar, whose end is that of the run."""
        self._update(epoch, epoch * steps + step + 1, self.epochs * steps, f"loss {loss:.3f}")

    def on_evaluation_batch(self, *, epoch: int, done: int) -> None:
        """Show the number of evaluated images."""
        self._update(epoch, None, None, f"{done} held-out images")

    def on_epoch_end(self, row: Any) -> None:
        """Print top-1 or mAP and loss on held-out images, training loss and time, within 80 columns."""
        if self.stage:  # a procedure without epochs; its result is printed at the end
            return
        loss, name = row.losses.get("loss", 0.0), row.metrics.score_name
        self.console.print(
            f"epoch {row.epoch:>3}/{self.epochs}  {name} [bold]{row.metrics.score:7.2%}[/]  "
            f"loss {row.metrics.loss:.3f} (training {loss:.3f})  {row.seconds:.1f} s"
        )

    def on_train_end(self, **_: Any) -> None:
        """Do nothing; the caller prints the result."""

    def _update(self, epoch: int, done: int | None, total: int | None, note: str) -> None:
        if self.task is not None:
            description = f"epoch {epoch + 1}/{self.epochs}"
            self.progress.update(self.task, description=description, completed=done, total=total, note=note)
