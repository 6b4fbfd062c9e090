"""Fine-tuning: start weights, frozen parameters, and the config of a teacher."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from torch import nn

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.config import Positive, StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier, is_in

LR_FACTOR = (
    "times"  # key of the optimizer's parameter groups: a factor on the learning rate; checkpoints contain it
)


class StartConfig(StrictModel):
    """Load all tensors of the checkpoint `weights` whose name and shape match.

    Only branches and the classifier may be missing from the checkpoint. `learn = "branches"` freezes
    everything else, including batch norm statistics. `head_factor` multiplies the learning rate of the
    classifier.
    """

    weights: Literal["imagenet", "none"] | Path | None = None
    learn: Literal["all", "branches"] = "all"
    head_factor: Positive = 1.0


class TeacherConfig(StrictModel):
    """Knowledge distillation from the network in the checkpoint `weights`.

    `share` is the weight of the divergence from the teacher's outputs in the loss of the main head.
    `temperature` softens both outputs, and its square scales the divergence. Source: Hinton et al.,
    "Distilling the Knowledge in a Neural Network" (2015).
    """

    weights: Path | None = None
    share: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    temperature: Positive = 1.0


def load_start_weights(start: StartConfig, model: Classifier) -> None:
    """Load the matching tensors of the checkpoint `start.weights` into *model*.

    Raises `ConfigError` if a tensor outside the branches and the classifier is missing, `CheckpointError`
    if the file cannot be read.
    """
    if start.weights is None:
        raise ConfigError("start.weights: not set; give the checkpoint to start from")
    if start.weights == "none":
        return
    if start.weights == "imagenet":
        raise ConfigError('start.weights: "imagenet" is not available yet; give a checkpoint or "none"')
    stored = read_checkpoint(start.weights.expanduser()).weights
    own = model.state_dict()
    matching = {
        name: stored[name] for name in own if name in stored and stored[name].shape == own[name].shape
    }
    optional = (*model.training_only, classifier_name(model))
    for name in own.keys() - matching.keys():
        if not is_in(name, *optional):
            raise ConfigError(
                f"start.weights: {start.weights} has no tensor {name} of the model's shape; give a "
                "checkpoint of the same network"
            )
    model.load_state_dict(matching, strict=False)


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
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[is_in(name, head)].append(parameter)
    return [
        {"params": groups[False], LR_FACTOR: 1.0},
        {"params": groups[True], LR_FACTOR: start.head_factor},
    ]
