"""`sopdeploy train` and `recipes`: from pictures to a checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from sopdeploy.cli.console import err, one_line_errors, out, plain_text, print_json
from sopdeploy.cli.training.dry_run import show_rehearsal

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
        self.console.print(Text.assemble(("warning:", "yellow"), " ", plain_text(warning)))

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


Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
FOLDER_RECIPE = "photos-dsop"
ALONE = "--resume"
SIGNALLED = 128  # exit code of a process that a signal ended, without the signal's number


class Resume(StrEnum):
    """Whether to go on with what lies in the folder."""

    NEVER = "never"
    ALWAYS = "always"
    AUTO = "auto"


class TrainCommand(TyperCommand):
    """A command whose `--resume` may stand alone or be followed by `auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write a `--resume` that stands alone out."""
        written = [
            f"{ALONE}={Resume.ALWAYS}" if word == ALONE and next_word != Resume.AUTO else word
            for word, next_word in zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, written)


def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe that `sopdeploy recipes` lists, or a .toml file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of pictures, DIR/<class>/*.jpg; the recipe's `data.path`.")
    ] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run. [dim]default runs/<recipe>[/dim]")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model's global pooling: short for --set model.config.pooling=NAME."
        ),
    ] = None,
    resume: Annotated[
        Resume,
        typer.Option(
            metavar="[auto]",
            help="Go on where the run in --out was stopped; [bold]auto[/bold]: or begin one.",
        ),
    ] = Resume.NEVER,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print recipe, learning rates, counts, memory and a timed step; write nothing."
        ),
    ] = False,
    find_learning_rate: Annotated[
        bool, typer.Option("--find-lr", help="Print the learning rate at which the loss falls fastest.")
    ] = False,
    logs: Annotated[
        list[str] | None,
        typer.Option(
            "--log", metavar="NAME", help="Log to tensorboard or wandb too; history.csv is always there."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network; Ctrl-C and SIGTERM save and end, SIGUSR1 saves; --resume goes on bit for bit.

    Example: [bold]sopdeploy train --data photos/[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --set epochs=10[/bold]

    Example: [bold]sopdeploy train --recipe digits-plain --pooling isqrt[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --dry-run[/bold]
    """
    with one_line_errors(as_json), stopped_by_a_signal(), ExitStack() as stack:
        from sopdeploy.errors import ConfigError
        from sopdeploy.layers.pooling.registry import check_name
        from sopdeploy.training.callbacks import CallbackList, loggers
        from sopdeploy.training.distributed.torchrun import is_first, joined_processes, started_by_torchrun
        from sopdeploy.training.loop import train as run
        from sopdeploy.training.recipe import read_recipe

        stack.enter_context(joined_processes())
        if recipe is None and data is None:
            raise ConfigError("say what to learn from: --data DIR for a folder of pictures, or --recipe NAME")
        source = recipe or FOLDER_RECIPE
        overrides = [*(settings or []), *([f"data.path={data}"] if data else [])]
        if pooling is not None:
            overrides.append(f"model.config.pooling={check_name(pooling)}")
        chosen = read_recipe(source, overrides)
        if rehearse or find_learning_rate:
            if started_by_torchrun():
                raise ConfigError("--dry-run and --find-lr look at one process; start them without torchrun")
            show_rehearsal(chosen, find_learning_rate=find_learning_rate, as_json=as_json)
            return
        folder = destination or Path("runs") / Path(source).stem
        go_on: bool | Literal["auto"] = "auto" if resume is Resume.AUTO else resume is Resume.ALWAYS
        onlookers = loggers(logs or (), folder) if is_first() else []
        if not as_json and is_first():
            onlookers.append(stack.enter_context(Bars(err)))
        result = run(chosen, folder, resume=go_on, progress=CallbackList(onlookers))
        if not is_first():
            return
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    out.print(
        f"best epoch {result.best_epoch} of {result.epochs}: top-1 [bold]{result.best_top1:.2%}[/] of "
        f"{result.held_out_count} held-out pictures, {result.seconds:.0f} s"
    )
    out.print(plain_text(f"next: sopdeploy export {result.best} --detach"))


@contextmanager
def stopped_by_a_signal() -> Iterator[None]:
    """End as a shell expects of a process that a signal ended, where that stopped the run."""
    from sopdeploy.training.signals import TrainingStoppedError

    try:
        yield
    except TrainingStoppedError as stopped:
        if not stopped.told:
            err.print(plain_text(str(stopped)))
        raise typer.Exit(SIGNALLED + stopped.signal_number) from stopped


def recipes(as_json: Json = False) -> None:
    """List the recipes that come with the package.

    Example: [bold]sopdeploy recipes[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.training.recipe import list_recipes, read_recipe

        found = {name: read_recipe(name).summary for name in list_recipes()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for name, summary in found.items():
        table.add_row(name, summary)
    out.print(table)
