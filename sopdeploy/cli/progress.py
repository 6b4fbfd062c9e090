"""What `sopdeploy train` shows while it runs: bars on a terminal, one line per epoch elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sopdeploy.cli.console import plain

WIDTH_OF_BAR = 28


class Bars:
    """Draws the epoch under way and prints a line for each one done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.epochs = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(WIDTH_OF_BAR),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int) -> None:
        """Say what the run learns from."""
        self.epochs = epochs
        resumed = f", resumed at epoch {first_epoch + 1}" if first_epoch else ""
        self.console.print(f"{train_count} pictures to learn from, {held_out_count} held out{resumed}")
        self.task = self.progress.add_task("", total=None, note="")

    def warned(self, warning: str) -> None:
        """Print the warning."""
        self.console.print(f"[yellow]warning:[/] {plain(warning)}")

    def stepped(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Move the bar of the epoch."""
        self.show(f"epoch {epoch + 1}/{self.epochs}", step + 1, steps, f"loss {loss:.3f}")

    def measured(self, *, epoch: int, done: int) -> None:
        """Say that held-out pictures are being measured."""
        self.show(f"epoch {epoch + 1}/{self.epochs}", done, None, "held-out pictures")

    def finished_epoch(self, row: Any) -> None:
        """Print what the epoch gave."""
        heads = ", ".join(f"{name} {loss:.3f}" for name, loss in row.losses.items())
        beside = ""
        if row.average is not None:
            beside = f"(raw {row.raw.top1:.2%}, average {row.average.top1:.2%})  "
        self.console.print(
            f"epoch {row.epoch:>3}/{self.epochs}  top-1 [bold]{row.figures.top1:.2%}[/]  {beside}"
            f"held-out loss {row.figures.loss:.3f}  training loss: {heads}  {row.seconds:.1f} s"
        )

    def show(self, description: str, done: int, total: int | None, note: str) -> None:
        """Redraw the bar."""
        if self.task is not None:
            self.progress.update(self.task, description=description, completed=done, total=total, note=note)
