"""`sopdeploy train` and `sopdeploy recipes`."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sopdeploy.api.options import TrainOptions, check_train
from sopdeploy.cli.app import SETTINGS
from sopdeploy.cli.command import command
from sopdeploy.cli.console import JsonOption, err, plain_text, print_json, print_table, say

if TYPE_CHECKING:
    from sopdeploy.api.training import TrainedRun

RESUME = ("never", "always", "auto")
OTHER_PROCEDURE = (
    "these figures describe the training loop, but train will run the procedure {} on these images"
)
SIGNAL_EXIT_CODE = 128  # plus the signal number, as shells expect

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."),
]


class TrainCommand(TyperCommand):
    """A command whose option `--resume` takes an optional value: `--resume` or `--resume auto`.

    An argument without an option ends it with the option that it may belong to.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace `--resume` without a value by `--resume=always`."""
        completed = [
            "--resume=always" if arg == "--resume" and following not in RESUME else arg
            for arg, following in zip_longest(args, args[1:])
        ]
        ctx.allow_extra_args = True
        rest: list[str] = super().parse_args(ctx, completed)
        if rest:
            option = "--recipe" if rest[0].endswith(".toml") else "--data"
            ctx.fail(f"Unexpected argument {rest[0]}; did you mean {option} {rest[0]}?")
        return rest


train_command = typer.Typer(add_completion=False, **SETTINGS)


@train_command.command("train", cls=TrainCommand)
@command()
def _train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe of `sopdeploy recipes`, or a .toml file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, DIR/<class>/*.jpg; sets `data.path`.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; by default runs/<project>-<number>.")
    ] = None,
    settings: SetOption = None,
    *,
    options: TrainOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe, counts and step time; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network; Ctrl-C and SIGTERM save and stop, --resume continues bit for bit.

    The run's report.html shows curves, confusions, calibration and the worst mistakes.

    Example: sopdeploy train --data photos/

    Example: sopdeploy train --data photos/ --from bundles/live

    Example: sopdeploy train --data photos/ --weights model.safetensors

    Example: sopdeploy train --recipe digits-dsop --set epochs=10

    Example: sopdeploy train --recipe digits-plain --set model.config.pooling=isqrt

    Example: sopdeploy train --recipe digits-dsop --dry-run
    """
    check_train(data, recipe, folder, options, settings or ())
    from sopdeploy.training.distributed.torchrun import is_main_process

    if dry_run:
        if is_main_process():
            _print_dry_run(data, recipe, options, settings or [], as_json=as_json)
        return
    with exit_on_signal():
        from sopdeploy.api.training import train as run

        result = run(data, recipe, folder, options=options, assignments=settings or (), progress=not as_json)
    if not is_main_process():
        return
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _print_result(result)


def _print_dry_run(
    data: Path | None, recipe: str | None, options: TrainOptions, settings: list[str], *, as_json: bool
) -> None:
    """Print the resolved recipe, counts and the time of a step of one process."""
    from sopdeploy.api.training import configure
    from sopdeploy.training.dry_run import dry_run
    from sopdeploy.training.recipe import flatten

    dry = dry_run(configure(data, recipe, options, settings).recipe)
    if as_json:
        print_json(dry.model_dump(mode="json"))
        return
    say(
        *(f"{key} = {value}" for key, value in flatten(dry.recipe)),
        "",
        f"{dry.train_count} training images of {dry.num_classes} classes, {dry.held_out_count} held out",
        f"{dry.num_steps} steps per epoch",
        f"parameters: {dry.training.parameters:,} in training, {dry.shipped.parameters:,} deployed",
        f"multiply-adds per image: {dry.training.macs:,} in training, {dry.shipped.macs:,} deployed",
        f"one step on {dry.device}: {dry.step_seconds:.3f} s",
        *([OTHER_PROCEDURE.format(dry.procedure)] if dry.procedure != "loop" else []),
    )


def _print_result(result: "TrainedRun") -> None:
    mistakes = [f"{count} x {true} predicted as {predicted}" for true, predicted, count in result.mistakes]
    worst = [f"most frequent mistakes: {', '.join(mistakes)}"] if mistakes else []
    say(*result.procedure.lines(), *worst, f"{result.seconds:.0f} s in total", f"page: {result.report}")
    if result.previous:
        say(result.previous)
    if result.decision is not None:
        say(*(f"{name}: {text}" for name, text in result.decision.rows()))
    say(f"next: sopdeploy export {result.best}{' --detach' * bool(result.training_only)}")


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


@command()
def recipes_command() -> None:
    """List the packaged recipes.

    Example: sopdeploy recipes
    """
    from sopdeploy.training.recipe_files import list_recipes, recipe_text

    summaries = ((name, tomllib.loads(recipe_text(name))["summary"]) for name in list_recipes())
    print_table(("recipe", "summary"), summaries)
