"""Output of `sopdeploy train --dry-run` and `--find-lr`."""

from typing import TYPE_CHECKING

from sopdeploy.cli.console import out, print_json, print_table, say

if TYPE_CHECKING:
    from sopdeploy.training.recipe import Recipe

MAX_ROWS = 20
FEW_SHOT = (
    "train will run the few-shot procedure on these images (table few_shot), not the training loop, which "
    "these figures describe"
)


def print_dry_run(recipe: "Recipe", *, as_json: bool) -> None:
    """Print the resolved recipe, learning rates, counts, memory and step time."""
    from sopdeploy.training.dry_run import dry_run
    from sopdeploy.training.recipe import flatten

    dry = dry_run(recipe)
    if as_json:
        print_json(dry.model_dump(mode="json"))
        return
    memory = dry.memory
    lines = [
        *(f"{key} = {value}" for key, value in flatten(dry.recipe)),
        "",
        f"{dry.train_count} training images of {dry.classes} classes, {dry.held_out_count} held out",
        f"{dry.steps} steps per epoch",
        "learning rate: " + ", ".join(f"{rate:.3g} at epoch {time:g}" for time, rate in dry.rates),
        f"parameters: {dry.training.parameters:,} in training, {dry.shipped.parameters:,} deployed",
        f"multiply-adds per image: {dry.training.macs:,} in training, {dry.shipped.macs:,} deployed",
        f"memory: about {memory.total:.0f} MiB: {memory.weights:.0f} weights, "
        f"{memory.gradients:.0f} gradients, {memory.optimizer:.0f} optimizer, {memory.average:.0f} average, "
        f"{memory.activations:.0f} activations",
        f"one step on {dry.device}: {dry.step_seconds:.3f} s; loading its images in one process: "
        f"{dry.load_seconds:.3f} s",
        *([FEW_SHOT] if dry.few_shot else []),
    ]
    say(*lines)


def print_learning_rates(recipe: "Recipe", *, as_json: bool) -> None:
    """Print the losses at increasing learning rates and the suggested rate."""
    from sopdeploy.training.lr_finder import find_learning_rate

    result = find_learning_rate(recipe)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    pairs = list(zip(result.rates, result.losses, strict=True))[:: max(1, len(result.rates) // MAX_ROWS)]
    print_table(("learning rate", "loss"), ((f"{rate:.2e}", f"{loss:.4f}") for rate, loss in pairs))
    suggestion = f"{result.suggestion:.2g}"
    out.print(f"the loss falls fastest at [bold]{suggestion}[/]: try --set optimizer.lr={suggestion}")
    if result.few_shot:
        say(FEW_SHOT)
