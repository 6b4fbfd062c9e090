"""The training loss: weighted heads, penalties of the model, distillation."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.decision import Activation
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.fine_tuning import TeacherConfig


class Loss(NamedTuple):
    """The minimized `total`, and the unweighted, detached `parts`."""

    total: Tensor
    parts: dict[str, Tensor]


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
    return Loss(total, {name: part.detach() for name, part in (losses | output.penalties).items()})


class Teacher:
    """The teacher of knowledge distillation, a network from a checkpoint."""

    def __init__(
        self, config: TeacherConfig, labels: tuple[str, ...], preprocess: Preprocess, device: torch.device
    ) -> None:
        if config.weights is None:
            raise ConfigError("teacher.weights: not set; give the checkpoint of the teacher")
        path = config.weights.expanduser()
        stored = read_checkpoint(path)
        if stored.labels != labels:
            raise ConfigError(f"teacher.weights: {path} has other classes than the data")
        if (stored.preprocess.mean, stored.preprocess.std) != (preprocess.mean, preprocess.std):
            raise ConfigError(
                f"teacher.weights: {path} normalizes colors differently; set the same preprocess.mean and std"
            )
        self.config = config
        self.model = build_classifier(stored, path).to(device).eval().requires_grad_(False)

    def add_to(self, loss: Loss, images: Tensor, output: Tensor | TrainingOutput) -> Loss:
        """Combine *loss* with the divergence of the main head from the teacher."""
        logits = output if isinstance(output, Tensor) else output.logits
        temperature, fraction = self.config.temperature, self.config.share
        with torch.no_grad():
            target = log_softmax(self.model(images).float() / temperature, dim=1)
        student = log_softmax(logits.float() / temperature, dim=1)
        divergence = kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
        total = (1 - fraction) * loss.total + fraction * divergence
        return Loss(total, {**loss.parts, "teacher": divergence.detach()})
