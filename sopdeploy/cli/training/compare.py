"""`sopdeploy compare`: train recipes over the same seeds and test whether one is better."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sopdeploy.api.progress import ProgressBars
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, out, plain_text
from sopdeploy.cli.training.train import SetOption, exit_on_signal

if TYPE_CHECKING:
    from sopdeploy.comparison.verdict import Comparison


def show(found: "Comparison") -> None:
    """Print top-1 of every run, and the differences with their intervals."""
    seeds = [f"seed {seed}" for seed in found.seeds]
    table = Table("recipe", "top-1", "sd", *seeds, box=None, pad_edge=False)
    for arm in found.arms:
        by_seed = [f"{accuracy:.2%}" for accuracy in arm.top1]
        table.add_row(plain_text(arm.name), f"{arm.mean:.2%}", f"{100 * arm.sd:.2f}", *by_seed)
    out.print(table)
    out.print(f"last epoch, {found.images} held-out images; differences in points of top-1")
    for pair in found.pairs:
        mcnemar = ", ".join(f"{one.only_second}:{one.only_first} (p {one.p:.2g})" for one in pair.mcnemar)
        low, high = 100 * pair.bootstrap_low, 100 * pair.bootstrap_high
        out.print()
        out.print(
            plain_text(f"{pair.second} - {pair.first}: {100 * pair.mean:+.2f} (sd {100 * pair.sd:.2f})")
        )
        out.print(f"  paired t, 95 %         {100 * pair.low:+.2f} to {100 * pair.high:+.2f}")
        out.print(f"  bootstrap, 95 %        {low:+.2f} to {high:+.2f}")
        out.print(f"  wins, ties, losses     {pair.wins}, {pair.ties}, {pair.losses}")
        out.print(f"  McNemar by seed        {mcnemar}")
        out.print(Text.assemble("  ", (pair.verdict, "bold")))
    if len(found.pairs) > 1:
        out.print(f"{len(found.pairs)} comparisons, each at the 95 % level: one in twenty is wrong by chance")


@command(show)
def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Two or more recipes.")],
    seeds: Annotated[int, typer.Option(help="Runs per recipe: seeds 0, 1 and so on.")] = 5,
    settings: SetOption = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/compare"),
) -> "Comparison":
    """Train recipes over the same seeds and report whether one is better than the first.

    Runs with the same seed have the same data order and, where names match, the same random initial weights.
    The weights of the last epoch are evaluated. Repeat the command to continue an interrupted comparison.

    Example: [bold]sopdeploy compare digits-plain digits-dsop --seeds 5[/bold]

    Example: [bold]sopdeploy compare mine.toml other.toml --set data.path=photos --out runs/mine[/bold]
    """
    with exit_on_signal(hint=" or with the same command"), ProgressBars(err) as bars:
        from sopdeploy.comparison.runs import compare as run

        progress: Any = bars  # implements the events that it shows

        return run(
            recipes,
            folder,
            seeds=seeds,
            overrides=settings or (),
            callback=progress,
            on_run=lambda name, seed: err.print(plain_text(f"{name}, seed {seed}")),
        )
