"""Which procedure trains a recipe, if it leaves the choice."""

from typing import NamedTuple

import torch

from sopdeploy.errors import ConfigError, shorten
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.settings.head import FewShotConfig, HeadOptions
from sopdeploy.training.settings.recipe import (
    AnyProcedureConfig,
    AutoConfig,
    FewShotRecipe,
    LoopConfig,
    Recipe,
)

FEW_IMAGES = 100_000  # up to them, the few-shot procedure keeps 1.8 GB (18 kB per image)
LOOP_INSTEAD = "procedure.kind=loop trains the whole network"
FEW_SHOT_INSTEAD = "procedure.kind=few_shot fits a linear classifier to the frozen network"


class Selected(NamedTuple):
    """A recipe with the selected procedure, and why "auto" selected it; empty if it did not."""

    recipe: Recipe
    reason: str


def select_procedure(
    recipe: Recipe, num_images: int, recorded: AnyProcedureConfig | None = None
) -> Selected:
    """Select the procedure of *recipe* for *num_images* training images.

    "auto" selects the *recorded* procedure of a resumed run. In a new run, it selects `few_shot`
    if all of these hold, otherwise the training loop:

    - the network has start weights,
    - it has no part that is used in training only, such as DSoP's branches, which a frozen network lacks,
    - there is a head for it,
    - there are at most `FEW_IMAGES` training images,
    - torchrun did not start the run.

    Raises `ConfigError` for `few_shot` and `fine_tune` if there is no head for the network, or
    if torchrun started the run.
    """
    config: AnyProcedureConfig = LoopConfig()
    reason = ""

    # The procedure that the recipe names, that of the resumed run, or a choice.
    if not isinstance(recipe.procedure, AutoConfig):
        config = recipe.procedure
    elif recorded is not None:
        config = recorded
    elif recipe.starts_random:
        reason = (
            "training loop, because the network starts from random weights, which all learn"
        )
    elif parts := entry(recipe.model.name).network.training_only:
        reason = (
            f"training loop, because {shorten(parts)} of {recipe.model.name} must be trained; "
            "procedure.kind=few_shot leaves them out"
        )
    elif not has_head(recipe):
        reason = f"training loop, because {recipe.model.name} has no linear classifier for frozen features"
    elif num_images > FEW_IMAGES:
        reason = f"training loop, for more than {FEW_IMAGES:,} images; {FEW_SHOT_INSTEAD}"
    elif torch.distributed.is_initialized():
        reason = "training loop, because torchrun started the run"
    else:
        config = FewShotConfig()
        reason = (
            f"linear classifier on frozen features (few_shot), for up to {FEW_IMAGES:,} images; "
            f"{LOOP_INSTEAD}"
        )

    if isinstance(config, HeadOptions):
        if torch.distributed.is_initialized():
            raise ConfigError(
                f"procedure {config.kind}: needs one process; start it without torchrun"
            )
        entry(head_name(recipe.model.name))  # raises the error if there is no head

    selected = recipe.part(FewShotRecipe) if isinstance(config, FewShotConfig) else recipe
    return Selected(selected.model_copy(update={"procedure": config}), reason)


def has_head(recipe: Recipe) -> bool:
    """Check whether the few-shot procedure has a head for the network."""
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:
        return False
    return True
