"""What `sopdeploy train --dry-run` and `--find-lr` print."""

from typing import TYPE_CHECKING

from rich.table import Table

from sopdeploy.cli.console import out, plain_text, print_json

if TYPE_CHECKING:
    from sopdeploy.training.dry_run import DryRun
    from sopdeploy.training.recipe import Recipe

ROWS = 20  # of the learning rates tried


def show_rehearsal(recipe: "Recipe", *, find_learning_rate: bool, as_json: bool) -> None:
    """Print what *recipe* would do, or which learning rate it bears."""
    if find_learning_rate:
        show_rates(recipe, as_json=as_json)
        return
    from sopdeploy.training.dry_run import dry_run
    from sopdeploy.training.resume import flat

    dry = dry_run(recipe)
    if as_json:
        print_json(dry.model_dump(mode="json"))
        return
    for key, value in flat(dry.recipe):
        out.print(plain_text(f"{key} = {value}"))
    show_costs(dry)


def show_costs(dry: "DryRun") -> None:
    """Print rates, counts, memory and time."""
    memory = dry.memory
    lines = [
        "",
        f"{dry.train_count} pictures of {dry.classes} classes to learn from, {dry.held_out_count} held out",
        f"{dry.steps} steps an epoch",
        "learning rate: " + ", ".join(f"{rate:.3g} at epoch {time:g}" for time, rate in dry.rates),
        f"parameters: {dry.training.parameters:,} in training, {dry.shipped.parameters:,} shipped",
        f"multiply-adds of a picture: {dry.training.macs:,} in training, {dry.shipped.macs:,} shipped",
        f"memory: about {memory.total:.0f} MiB: {memory.weights:.0f} weights, "
        f"{memory.gradients:.0f} gradients, "
        f"{memory.optimizer:.0f} optimizer, {memory.average:.0f} average, "
        f"{memory.activations:.0f} activations",
        f"one step on {dry.device}: {dry.step_seconds:.3f} s; its pictures in one process: "
        f"{dry.load_seconds:.3f} s",
    ]
    for line in lines:
        out.print(plain_text(line))


def show_rates(recipe: "Recipe", *, as_json: bool) -> None:
    """Print the loss at growing learning rates and the rate to try."""
    from sopdeploy.training.lr_finder import find_learning_rate

    found = find_learning_rate(recipe)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    table = Table("learning rate", "loss", box=None, pad_edge=False)
    seen = list(zip(found.rates, found.losses, strict=True))
    for rate, loss in seen[:: max(1, len(seen) // ROWS)]:
        table.add_row(f"{rate:.2e}", f"{loss:.4f}")
    out.print(table)
    best = f"{found.suggestion:.2g}"
    out.print(f"the loss falls fastest at [bold]{best}[/]: try --set optimizer.lr={best}")
