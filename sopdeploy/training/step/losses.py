"""The training loss: weighted heads and penalties of the model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sopdeploy.decision import Activation
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.models.base import TrainingOutput


class Loss(NamedTuple):
    """The `total` to minimize, its detached `parts` without weights, and the counts of `TrainingOutput`."""

    total: Tensor
    parts: dict[str, Tensor]
    component_counts: Tensor | None = None


def training_loss(
    output: Tensor | TrainingOutput,
    labels: Tensor,
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
    activation: Activation = "softmax",
) -> Loss:
    """Compute alpha * main + sum of beta * branch + penalties.

    *labels* are class indices (B,) or probabilities (B, classes); *activation* and *label_smoothing* are
    those of `classification_loss`. *weights* are the model's `loss_weights()`: alpha under `main`, each
    beta under the name of its branch.
    """
    if isinstance(output, Tensor):
        output = TrainingOutput(output, {}, {})
    heads = {"main": output.logits, **output.branches}
    losses = {
        name: classification_loss(logits, labels, activation, label_smoothing=label_smoothing)
        for name, logits in heads.items()
    }
    weighted = [weights[name] * loss for name, loss in losses.items()]
    total = torch.stack([*weighted, *output.penalties.values()]).sum()
    parts = {name: part.detach() for name, part in (losses | output.penalties).items()}
    return Loss(total, parts, output.component_counts)
