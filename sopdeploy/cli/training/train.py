"""`sopdeploy train` and `sopdeploy recipes`."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from typer.core import TyperCommand

from sopdeploy.cli.app import SETTINGS
from sopdeploy.cli.console import JsonOption, err, one_line_errors, out, plain_text, print_json
from sopdeploy.cli.training.dry_run import print_dry_run, print_learning_rates

SIGNAL_EXIT_CODE = 128  # plus the signal number, as shells expect

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
]


class TrainCommand(TyperCommand):
    """A command whose option `--resume` takes an optional value: `--resume` or `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace `--resume` without a value by `--resume=always`."""
        following = zip_longest(args, args[1:])
        return super().parse_args(
            ctx,
            ["--resume=always" if arg == "--resume" and value != "auto" else arg for arg, value in following],
        )


command = typer.Typer(add_completion=False, **SETTINGS)


@command.command("train", cls=TrainCommand)
def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe of `sopdeploy recipes`, or a .toml file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, DIR/<class>/*.jpg; sets `data.path`.")
    ] = None,
    destination: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run. [dim]default runs/<recipe>-<number>[/dim]"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|none|FILE",
            help="Start weights: imagenet, none (random), a checkpoint or a weight file; sets "
            "`start.weights`. [dim]default imagenet for --data without --recipe[/dim]",
        ),
    ] = None,
    settings: SetOption = None,
    pooling: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Global pooling: short for --set model.config.pooling=NAME."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Networks to compare, each NAME or NAME=FILE with its weights; sets `model.name` and "
            "`few_shot.models`.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="Time after which no further head is tried, such as 60s; sets `few_shot.budget`.",
        ),
    ] = None,
    resume: Annotated[
        Literal["never", "always", "auto"],
        typer.Option(
            metavar="[auto]",
            help="Continue the run in --out, by default the newest of the recipe; with [bold]auto[/bold], "
            "start a new one if there is none.",
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
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also print the training loss of every branch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network; Ctrl-C and SIGTERM save and stop, SIGUSR1 saves, --resume continues bit for bit.

    Example: [bold]sopdeploy train --data photos/[/bold]

    Example: [bold]sopdeploy train --data photos/ --weights resnet18-f37072fd.pth[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --set epochs=10[/bold]

    Example: [bold]sopdeploy train --recipe digits-plain --pooling isqrt[/bold]

    Example: [bold]sopdeploy train --recipe digits-dsop --dry-run[/bold]
    """
    with one_line_errors(as_json), exit_on_signal():
        from sopdeploy.api.training import configure, few_shot_settings
        from sopdeploy.api.training import train as run
        from sopdeploy.errors import ConfigError
        from sopdeploy.training.distributed.torchrun import is_distributed, is_main_process, join_processes

        if dry_run or find_learning_rate:
            with join_processes():
                changes = {"weights": weights, "pooling": pooling}
                assignments = [*(settings or ()), *few_shot_settings(models, budget)]
                loaded, _ = configure(data, recipe, **changes, assignments=assignments)
                if is_distributed():
                    raise ConfigError("--dry-run and --find-lr use one process; start them without torchrun")
                (print_learning_rates if find_learning_rate else print_dry_run)(loaded, as_json=as_json)
            return
        result = run(
            data,
            recipe,
            destination,
            weights=weights,
            pooling=pooling,
            models=models,
            budget=budget,
            resume=resume,
            log=logs or (),
            assignments=settings or (),
            progress=not as_json,
            verbose=verbose,
        )
        if not is_main_process():
            return
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    if result.few_shot is not None:
        for line in result.few_shot.lines():
            out.print(plain_text(line))
    elif result.estimate is not None:
        epoch = f"epoch {result.best_epoch} of {result.epochs}"
        out.print(f"{epoch}: {result.estimate.describe()}, {result.seconds:.0f} s")
    for name, text in result.decision.rows() if result.decision is not None else ():
        out.print(plain_text(f"{name}: {text}"))
    detach = " --detach" if result.training_only else ""
    out.print(plain_text(f"next: sopdeploy export {result.best}{detach}"))


@contextmanager
def exit_on_signal(hint: str = "") -> Iterator[None]:
    """Exit with 128 + signal number if a signal stopped the run; *hint* is added to the message."""
    from sopdeploy.training.signals import TrainingStoppedError

    try:
        yield
    except TrainingStoppedError as stopped:
        if not stopped.reported:
            err.print(plain_text(f"{stopped}{hint}"))
        raise typer.Exit(SIGNAL_EXIT_CODE + stopped.signal_number) from stopped


def recipes(as_json: JsonOption = False) -> None:
    """List the packaged recipes.

    Example: [bold]sopdeploy recipes[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.training.recipe import list_recipes, recipe_text

        # Validating the recipes would import timm, whose networks some of them train.
        summaries = {name: tomllib.loads(recipe_text(name))["summary"] for name in list_recipes()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in summaries.items()])
        return
    table = Table("recipe", "summary", box=None, pad_edge=False)
    for name, summary in summaries.items():
        table.add_row(name, summary)
    out.print(table)
