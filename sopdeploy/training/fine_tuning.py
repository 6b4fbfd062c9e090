"""Fine-tuning: the config of start weights, frozen parameters and the learning rate of the classifier."""

from pathlib import Path
from typing import Any, Literal

from torch import nn

from sopdeploy.config import PositiveRate, StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier, is_in

# Key of a factor on the learning rate in the optimizer's parameter groups; checkpoints contain it.
LR_FACTOR = "times"


class StartConfig(StrictModel):
    """The weights to start from, and which parameters are trained.

    `weights` is a checkpoint, a weight file that `sopdeploy import` reads, "imagenet" for the published
    weights of the backbone, or "none" for random ones (see `start_weights`). `learn = "branches"` freezes
    everything but the branches, including batch norm statistics. `head_factor` multiplies the learning rate
    of the classifier.
    """

    weights: Literal["imagenet", "none"] | Path | None = None
    learn: Literal["all", "branches"] = "all"
    head_factor: PositiveRate = 1.0


def classifier_name(model: Classifier) -> str:
    """Return the name of the last linear layer of the deployed network."""
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not is_in(name, *model.training_only)][-1]


def set_train_mode(model: Classifier, start: StartConfig | None) -> None:
    """Put *model*, or with `learn = "branches"` only its branches, into train mode."""
    model.train()
    if start is not None and start.learn == "branches":
        branches = model.training_only
        for name, module in model.named_modules():
            contains_branch = any(branch.startswith(f"{name}.") for branch in branches)
            module.training = name == "" or contains_branch or is_in(name, *branches)


def parameter_groups(model: Classifier, start: StartConfig | None) -> list[dict[str, Any]]:
    """Build the optimizer's parameter groups and freeze what `start.learn` excludes.

    The classifier gets its own group if `head_factor` is not 1. Raises `ConfigError` if there are no
    branches to train.
    """
    if start is not None and start.learn == "branches":
        if not model.training_only:
            raise ConfigError('start.learn: this network has no branches; use learn = "all"')
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_in(name, *model.training_only))
    if start is None or start.head_factor == 1:
        return [{"params": list(model.parameters())}]
    head = classifier_name(model)
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if not is_in(name, head)], LR_FACTOR: 1.0},
        {
            "params": [parameter for name, parameter in named if is_in(name, head)],
            LR_FACTOR: start.head_factor,
        },
    ]
