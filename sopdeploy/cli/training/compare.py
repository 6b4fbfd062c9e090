"""`sopdeploy compare`: which recipe is better, and whether that can be said at all."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from sopdeploy.cli.console import err, one_line_errors, out, plain_text, print_json
from sopdeploy.cli.training.train import SIGNALLED, Bars

if TYPE_CHECKING:
    from sopdeploy.comparison.verdict import Comparison, Pair


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Two recipes or more.")],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe: seeds 0, 1 and so on.")] = 5,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of every recipe.")
    ] = None,
    destination: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/compare"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Run recipes over the same seeds and say whether one is better than the first.

    Pairs of runs have the same seed, order of data and start weights where names match; the last epoch
    counts. The same command goes on where it was stopped.

    Example: [bold]sopdeploy compare digits-plain digits-dsop --seeds 5[/bold]

    Example: [bold]sopdeploy compare mine.toml other.toml --set data.path=photos --out runs/mine[/bold]
    """
    with one_line_errors(as_json), ExitStack() as stack:
        from sopdeploy.comparison.runs import compare as run
        from sopdeploy.training.signals import TrainingStoppedError

        progress = None if as_json else stack.enter_context(Bars(err))

        def tell(name: str, seed: int) -> None:
            if not as_json:
                err.print(plain_text(f"{name}, seed {seed}"))

        try:
            found = run(
                recipes, destination, seeds=seeds, overrides=settings or (), progress=progress, on_run=tell
            )
        except TrainingStoppedError as stopped:
            err.print(plain_text(f"{stopped} or with the same command"))
            raise typer.Exit(SIGNALLED + stopped.signal_number) from stopped
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(found)


def show(found: "Comparison") -> None:
    """Print every recipe's figures, then each pair."""
    table = Table(
        "recipe", "top-1", "sd", *(f"seed {seed}" for seed in found.seeds), box=None, pad_edge=False
    )
    for arm in found.arms:
        table.add_row(
            plain_text(arm.name),
            f"{arm.mean:.2%}",
            f"{100 * arm.sd:.2f}",
            *(f"{share:.2%}" for share in arm.top1),
        )
    out.print(table)
    out.print(f"the last epoch, on {found.pictures} held-out pictures; differences are in points of top-1")
    for pair in found.pairs:
        show_pair(pair)
    if len(found.pairs) > 1:
        out.print(f"{len(found.pairs)} comparisons, each with its own 95 %: one in twenty errs")


def show_pair(pair: "Pair") -> None:
    """Print how one recipe differs from the first."""
    out.print()
    out.print(plain_text(f"{pair.second} - {pair.first}: {100 * pair.mean:+.2f} (sd {100 * pair.sd:.2f})"))
    out.print(f"  paired t, 95 %         {100 * pair.low:+.2f} to {100 * pair.high:+.2f}")
    out.print(f"  seeds and pictures     {100 * pair.bootstrap_low:+.2f} to {100 * pair.bootstrap_high:+.2f}")
    out.print(f"  wins, ties, losses     {pair.wins}, {pair.ties}, {pair.losses}")
    splits = ", ".join(f"{one.only_second}:{one.only_first} (p {one.p:.2g})" for one in pair.mcnemar)
    out.print(f"  McNemar by seed        {splits}")
    out.print(Text.assemble("  ", (pair.verdict, "bold")))
