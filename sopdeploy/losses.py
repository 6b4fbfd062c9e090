"""What training minimises: the loss of every head, weighted, and the model's own penalties."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sopdeploy.models.base import TrainingOutput


class Loss(NamedTuple):
    """`total` is minimised; `parts`, to be looked at, are the heads' cross-entropies and the penalties.

    The parts are not weighted and carry no gradient.
    """

    total: Tensor
    parts: dict[str, Tensor]


def training_loss(
    output: Tensor | TrainingOutput,
    labels: Tensor,
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
) -> Loss:
    """Return alpha * main + sum of beta * branch + penalties.

    *weights* are the model's `loss_weights()`: alpha as `main`, beta under the branches' names.
    """
    if isinstance(output, Tensor):
        output = TrainingOutput(output, {}, {})
    heads = {"main": output.logits, **output.branches}
    losses = {
        name: cross_entropy(logits, labels, label_smoothing=label_smoothing) for name, logits in heads.items()
    }
    weighted = [weights[name] * loss for name, loss in losses.items()]
    total = torch.stack([*weighted, *output.penalties.values()]).sum()
    return Loss(total, {name: part.detach() for name, part in (losses | output.penalties).items()})


def first_not_finite(loss: Loss) -> str | None:
    """Return the name of the part of *loss* that is infinite or not a number, or `None`."""
    if bool(torch.isfinite(loss.total)):
        return None
    return next((name for name, part in loss.parts.items() if not bool(torch.isfinite(part))), "the sum")
