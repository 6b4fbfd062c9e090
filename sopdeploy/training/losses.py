"""What training minimises: the loss of every head, weighted, and the model's own penalties."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.fine_tuning import TeacherChoice


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


class Teacher:
    """The network of a checkpoint, in eval mode."""

    def __init__(
        self, choice: TeacherChoice, labels: tuple[str, ...], preprocess: Preprocess, device: torch.device
    ) -> None:
        if choice.weights is None:
            raise ConfigError("teacher.weights: not set; give the checkpoint of the teacher")
        path = choice.weights.expanduser()
        stored = read_checkpoint(path)
        if stored.labels != labels:
            raise ConfigError(f"teacher.weights: {path} knows other classes than the data has")
        if (stored.preprocess.mean, stored.preprocess.std) != (preprocess.mean, preprocess.std):
            raise ConfigError(
                f"teacher.weights: {path} sees other colours; set preprocess.mean and std to its"
            )
        self.choice = choice
        self.model = build_classifier(stored, path).to(device).eval().requires_grad_(False)

    def join(self, loss: Loss, images: Tensor, output: Tensor | TrainingOutput) -> Loss:
        """Return *loss* with the divergence of the main head from the teacher's answers to *images*."""
        logits = output if isinstance(output, Tensor) else output.logits
        heat, share = self.choice.temperature, self.choice.share
        with torch.no_grad():
            wanted = log_softmax(self.model(images).float() / heat, dim=1)
        found = log_softmax(logits.float() / heat, dim=1)
        apart = kl_div(found, wanted, reduction="batchmean", log_target=True) * heat**2
        return Loss((1 - share) * loss.total + share * apart, {**loss.parts, "teacher": apart.detach()})
