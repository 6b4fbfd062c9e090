"""What a run takes over from networks that were trained before it: weights to start from, and a teacher."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from torch import nn

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.config import Positive, StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.module_names import is_in_any


class StartChoice(StrictModel):
    """Start from the checkpoint `weights`, tensor by tensor of the same name and shape.

    What the checkpoint lacks must be branches or the classifier. `learn = "branches"` leaves everything else
    as it was, batch norm's statistics included: the second of two phases. `head_factor` multiplies the
    learning rate of the classifier.
    """

    weights: Path | None = None
    learn: Literal["all", "branches"] = "all"
    head_factor: Positive = 1.0


class TeacherChoice(StrictModel):
    """Learn the answers of the network in the checkpoint `weights` beside the classes.

    `share` of the loss of the main head is the divergence from the teacher's answers, both softened by
    `temperature` and scaled by its square. Source: Hinton et al., "Distilling the Knowledge in a Neural
    Network" (2015).
    """

    weights: Path | None = None
    share: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    temperature: Positive = 1.0


TIMES = "times"  # what a group of the optimizer's parameters multiplies the learning rate by


def take_weights(start: StartChoice, model: Classifier) -> None:
    """Load the tensors of the checkpoint into *model*; raises `ConfigError`, `CheckpointError`.

    Only training-only parts and the classifier may stay fresh.
    """
    if start.weights is None:
        raise ConfigError("start.weights: not set; give the checkpoint to start from")
    stored = read_checkpoint(start.weights.expanduser()).weights
    mine = model.state_dict()
    same = {name: stored[name] for name in mine if name in stored and stored[name].shape == mine[name].shape}
    may_be_fresh = (*model.training_only, head_of(model))
    for name in mine.keys() - same.keys():
        if not is_in_any(name, may_be_fresh):
            raise ConfigError(
                f"start.weights: {start.weights} has no {name} of the network's shape; is it another?"
            )
    model.load_state_dict(same, strict=False)


def head_of(model: Classifier) -> str:
    """Return the name of the classifier: the last linear layer that ships."""
    linear: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_in_any(name, model.training_only)
    ]
    return linear[-1]


def into_training(model: Classifier, start: StartChoice | None) -> None:
    """Put *model* into train mode; where only branches learn, all else answers as in evaluation."""
    model.train()
    if start is not None and start.learn == "branches":
        parts = model.training_only
        for name, module in model.named_modules():
            holds_one = any(part.startswith(f"{name}.") for part in parts)
            module.training = name == "" or holds_one or is_in_any(name, parts)


def parameter_groups(model: Classifier, start: StartChoice | None) -> list[dict[str, Any]]:
    """Return what the optimizer moves, in groups where the classifier has a learning rate of its own.

    What does not learn is marked so. Raises `ConfigError` where there are no branches to learn.
    """
    if start is not None and start.learn == "branches":
        if not model.training_only:
            raise ConfigError("start.learn: this network has no branches that could learn alone")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_in_any(name, model.training_only))
    if start is None or start.head_factor == 1:
        return [{"params": list(model.parameters())}]
    head = (head_of(model),)
    body = [parameter for name, parameter in model.named_parameters() if not is_in_any(name, head)]
    top = [parameter for name, parameter in model.named_parameters() if is_in_any(name, head)]
    return [{"params": body, TIMES: 1.0}, {"params": top, TIMES: start.head_factor}]
