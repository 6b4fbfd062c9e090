"""Output of `sopdeploy train --dry-run`."""

from typing import TYPE_CHECKING

from sopdeploy.cli.console import print_json, say

if TYPE_CHECKING:
    from sopdeploy.training.recipe import Recipe

FEW_SHOT = (
    "train will run the few-shot procedure on these images (table few_shot), not the training loop, which "
    "these figures describe"
)


def print_dry_run(recipe: "Recipe", *, as_json: bool) -> None:
    """Print the resolved recipe, counts and step time."""
    from sopdeploy.training.dry_run import dry_run
    from sopdeploy.training.recipe import flatten

    dry = dry_run(recipe)
    if as_json:
        print_json(dry.model_dump(mode="json"))
        return
    say(
        *(f"{key} = {value}" for key, value in flatten(dry.recipe)),
        "",
        f"{dry.train_count} training images of {dry.classes} classes, {dry.held_out_count} held out",
        f"{dry.steps} steps per epoch",
        f"parameters: {dry.training.parameters:,} in training, {dry.shipped.parameters:,} deployed",
        f"multiply-adds per image: {dry.training.macs:,} in training, {dry.shipped.macs:,} deployed",
        f"one step on {dry.device}: {dry.step_seconds:.3f} s",
        *([FEW_SHOT] if dry.few_shot else []),
    )
