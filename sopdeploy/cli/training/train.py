"""`sopdeploy train` and `sopdeploy recipes`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from sopdeploy.cli.console import JsonOption, err, one_line_errors, out, plain_text, print_json
from sopdeploy.cli.training.dry_run import print_dry_run, print_learning_rates

FOLDER_RECIPE = "photos-dsop"
SIGNAL_EXIT_CODE = 128  # plus the signal number, as shells expect

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
]


class ProgressBars:
    """A training callback that draws a progress bar and prints a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.epochs = 0
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

    def on_train_start(self, *, epochs: int, first_epoch: int, train_count: int, held_out_count: int) -> None:
        """Print the size of the data."""
        self.epochs = epochs
        resumed = f", resumed at epoch {first_epoch + 1}" if first_epoch else ""
        self.console.print(f"{train_count} training images, {held_out_count} held out{resumed}")
        self.task = self.progress.add_task("", total=None, note="")

    def on_warning(self, warning: str) -> None:
        """Print the warning."""
        self.console.print(Text.assemble(("warning:", "yellow"), " ", plain_text(warning)))

    def on_step_end(self, *, epoch: int, step: int, steps: int, loss: float) -> None:
        """Advance the bar."""
        self._update(epoch, step + 1, steps, f"loss {loss:.3f}")

    def on_evaluation_batch(self, *, epoch: int, done: int) -> None:
        """Show the number of evaluated images."""
        self._update(epoch, done, None, "held-out images")

    def on_epoch_end(self, row: Any) -> None:
        """Print the metrics of the epoch."""
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in row.losses.items())
        both = ""
        if row.average is not None:
            both = f"(raw {row.raw.top1:.2%}, average {row.average.top1:.2%})  "
        self.console.print(
            f"epoch {row.epoch:>3}/{self.epochs}  top-1 [bold]{row.figures.top1:.2%}[/]  {both}"
            f"held-out loss {row.figures.loss:.3f}  training loss: {losses}  {row.seconds:.1f} s"
        )

    def _update(self, epoch: int, done: int, total: int | None, note: str) -> None:
        if self.task is not None:
            description = f"epoch {epoch + 1}/{self.epochs}"
            self.progress.update(self.task, description=description, completed=done, total=total, note=note)


class TrainCommand(TyperCommand):
    """A command whose option `--resume` takes an optional value: `--resume` or `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace `--resume` without a value by `--resume=always`."""
        following = zip_longest(args, args[1:])
        return super().parse_args(
            ctx,
            ["--resume=always" if arg == "--resume" and value != "auto" else arg for arg, value in following],
        )


def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe of `sopdeploy recipes`, or a .toml file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, DIR/<class>/*.jpg; sets `data.path`.")
    ] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run. [dim]default runs/<recipe>[/dim]")
    ] = None,
    settings: SetOption = None,
    pooling: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Global pooling: short for --set model.config.pooling=NAME."),
    ] = None,
    resume: Annotated[
        Literal["never", "always", "auto"],
        typer.Option(
            metavar="[auto]", help="Resume the run in --out; [bold]auto[/bold]: or start a new one."
        ),
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print recipe, learning rates, counts, memory and step time; write nothing."
        ),
    ] = False,
    find_learning_rate: Annotated[
        bool,
        typer.Option("--find-lr", help="Print the learning rate at which the loss falls fastest."),
    ] = False,
    logs: Annotated[
        list[str] | None,
        typer.Option("--log", metavar="NAME", help="Also log to tensorboard or wandb."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network; Ctrl-C and SIGTERM save and stop, SIGUSR1 saves, --resume continues bit for bit.

    Example: [bold]sopdeploy train --data photos/[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --set epochs=10[/bold]

    Example: [bold]sopdeploy train --recipe digits-plain --pooling isqrt[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --dry-run[/bold]
    """
    with one_line_errors(as_json), exit_on_signal(), ExitStack() as stack:
        from sopdeploy.errors import ConfigError
        from sopdeploy.layers.pooling.registry import check_name
        from sopdeploy.training.callbacks import CallbackList, create_loggers
        from sopdeploy.training.distributed.torchrun import is_distributed, is_main_process, join_processes
        from sopdeploy.training.loop import train as run
        from sopdeploy.training.recipe import read_recipe

        stack.enter_context(join_processes())
        if recipe is None and data is None:
            raise ConfigError("no training data: give --data DIR for a folder of images, or --recipe NAME")
        source = recipe or FOLDER_RECIPE
        overrides = [*(settings or []), *([f"data.path={data}"] if data else [])]
        if pooling is not None:
            overrides.append(f"model.config.pooling={check_name(pooling)}")
        loaded = read_recipe(source, overrides)
        if dry_run or find_learning_rate:
            if is_distributed():
                raise ConfigError("--dry-run and --find-lr use one process; start them without torchrun")
            (print_learning_rates if find_learning_rate else print_dry_run)(loaded, as_json=as_json)
            return
        folder = destination or Path("runs") / Path(source).stem
        callbacks: list[Any] = create_loggers(logs or (), folder) if is_main_process() else []
        if not as_json and is_main_process():
            callbacks.append(stack.enter_context(ProgressBars(err)))
        result = run(
            loaded,
            folder,
            resume="auto" if resume == "auto" else resume == "always",
            callback=CallbackList(callbacks),
        )
        if not is_main_process():
            return
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    out.print(
        f"best epoch {result.best_epoch} of {result.epochs}: top-1 [bold]{result.best_top1:.2%}[/] of "
        f"{result.held_out_count} held-out images, {result.seconds:.0f} s"
    )
    out.print(plain_text(f"next: sopdeploy export {result.best} --detach"))


@contextmanager
def exit_on_signal(hint: str = "") -> Iterator[None]:
    """Exit with 128 + signal number if a signal stopped the run; *hint* is added to the message."""
    from sopdeploy.training.signals import TrainingStoppedError

    try:
        yield
    except TrainingStoppedError as stopped:
        if not stopped.told:
            err.print(plain_text(f"{stopped}{hint}"))
        raise typer.Exit(SIGNAL_EXIT_CODE + stopped.signal_number) from stopped


def recipes(as_json: JsonOption = False) -> None:
    """List the packaged recipes.

    Example: [bold]sopdeploy recipes[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.training.recipe import list_recipes, read_recipe

        summaries = {name: read_recipe(name).summary for name in list_recipes()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in summaries.items()])
        return
    table = Table("recipe", "summary", box=None, pad_edge=False)
    for name, summary in summaries.items():
        table.add_row(name, summary)
    out.print(table)
