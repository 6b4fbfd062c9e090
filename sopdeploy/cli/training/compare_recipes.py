"""`sopdeploy compare-recipes`: test whether one recipe is better than another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.api.progress import ProgressBars
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, out, plain_text, print_table, say
from sopdeploy.cli.training.train import SetOption, exit_on_signal

if TYPE_CHECKING:
    from sopdeploy.recipe_comparison import RecipeComparison


def _show(comparison: "RecipeComparison") -> None:
    """Print top-1 of every run, and the differences with their intervals."""
    seeds = (f"seed {seed}" for seed in comparison.seeds)
    rows = (
        (arm.name, f"{arm.mean:.2%}", f"{100 * arm.sd:.2f}", *(f"{accuracy:.2%}" for accuracy in arm.top1))
        for arm in comparison.arms
    )
    print_table(("recipe", "top-1", "sd", *seeds), rows)
    say(f"last epoch, {comparison.num_images} held-out images; differences in points of top-1")
    for pair in comparison.pairs:
        out.print()
        say(f"{pair.second} - {pair.first}: {100 * pair.mean:+.2f} (sd {100 * pair.sd:.2f})")
        out.print(f"  paired t, 95 %         {100 * pair.low:+.2f} to {100 * pair.high:+.2f}")
        out.print(f"  wins, ties, losses     {pair.wins}, {pair.ties}, {pair.losses}")
        say(pair.verdict, style="bold")
    if len(comparison.pairs) > 1:
        say(f"{len(comparison.pairs)} comparisons, each at the 95 % level: one in twenty is wrong by chance")


@command(_show)
def compare_recipes_command(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Two or more recipes.")],
    seeds: Annotated[int, typer.Option(help="Runs per recipe: seeds 0, 1 and so on.")] = 5,
    settings: SetOption = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/compare-recipes"),
) -> "RecipeComparison":
    """Train recipes over the same seeds and report whether one is better than the first.

    Runs with the same seed have the same data order and, with and without branches, the same initial
    backbone. The weights of the last epoch are evaluated. Repeat the command to continue an interrupted
    comparison.

    Example: [bold]sopdeploy compare-recipes digits-plain digits-dsop --seeds 5[/bold]

    Example: [bold]sopdeploy compare-recipes a.toml b.toml --set data.path=photos --out runs/ab[/bold]
    """
    with exit_on_signal(hint=" or with the same command"), ProgressBars(err) as bars:
        from sopdeploy.recipe_comparison import compare_recipes as run

        progress: Any = bars  # implements the events that it shows

        return run(
            recipes,
            folder,
            seeds=seeds,
            overrides=settings or (),
            callback=progress,
            on_run=lambda name, seed: err.print(plain_text(f"{name}, seed {seed}")),
        )
