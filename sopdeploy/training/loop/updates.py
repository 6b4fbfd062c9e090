"""The updates of the weights: the optimizer, the rates of its groups of parameters, and the scale of fp16."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sopdeploy.models.base import Classifier, is_in
from sopdeploy.training.loop.optimizer import create_optimizer
from sopdeploy.training.settings.loop import StartConfig, UpdateSettings
from sopdeploy.training.start_weights import classifier_name

# Key of a factor on the learning rate in the optimizer's parameter groups; checkpoints contain
# it.
LR_FACTOR = "times"


class Updates:
    """The updates of the weights in a run; *scaled* ones, of fp16, have a scale of the loss.

    Attributes:
        groups: Groups of the optimizer's parameters.
    """

    def __init__(self, settings: UpdateSettings, device: torch.device, *, scaled: bool) -> None:
        self.settings = settings
        self.groups: list[dict[str, Any]] = []
        # Without *scaled*, the scaler changes nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer; it is created on first use, because this imports torch's compiler."""
        return create_optimizer(self.settings.optimizer, self.groups)

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state, by its key in `last.pt`."""
        scaler = {"scaler": self.scaler} if self.scaler.is_enabled() else {}
        return {"optimizer": self.optimizer, **scaler}

    @property
    def rate(self) -> float:
        """The learning rate of the last step, without `head_factor` except in the first phase."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def set_rates(self, time: float) -> None:
        """Set the learning rate of each group after *time* epochs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(time, group.get(LR_FACTOR, 1.0))

    def apply(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        """Change the weights by the gradients of *parameters*, whose *norm* `clip_norm` limits."""
        if self.settings.optimizer.clip_norm:  # 0 disables clipping
            clip_grads_with_norm_(parameters, self.settings.optimizer.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def take_states(self, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Delete the optimizer; return its states of the *named* parameters, none before its first step."""
        if "optimizer" not in vars(self):  # the cached property has created none
            return {}
        states = self.optimizer.state
        taken = {name: states[value] for name, value in named.items() if value in states}
        del self.optimizer  # the next access creates one for the new groups
        return taken

    def give_states(self, named: Mapping[str, nn.Parameter], states: Mapping[str, Any]) -> None:
        """Give the *named* parameters the *states* that they had in the optimizer before."""
        for name, parameter in named.items():
            if name in states:
                self.optimizer.state[parameter] = states[name]


def group_parameters(
    model: Classifier, start: StartConfig | None, new: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Build the optimizer's parameter groups: those with a factor on the learning rate have their own.

    *new* are the parts that the weights to start from do not have.
    """
    if start is None or start.head_factor == start.new_factor == 1:
        return [{"params": list(model.parameters())}]

    head = classifier_name(model)
    faster = () if start.new_factor == 1 else (*new,)
    others, added, classifier = [], [], []
    for name, parameter in model.named_parameters():
        if is_in(name, head):
            classifier.append(parameter)
        elif is_in(name, *faster):
            added.append(parameter)
        else:
            others.append(parameter)

    groups = [
        {"params": others, LR_FACTOR: 1.0},
        {"params": classifier, LR_FACTOR: start.head_factor},
    ]
    return [*groups, {"params": added, LR_FACTOR: start.new_factor}] if added else groups
