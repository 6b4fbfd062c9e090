"""The training loss: weighted heads and penalties of the model, and knowledge distillation.

A teacher is trained before, or jointly with its student. Sources: Hinton et al., "Distilling
the Knowledge in a Neural Network" (2015); Mishra and Marr, "Apprentice" (ICLR 2018), schemes A
(joint) and B (teacher first). DSoP's Table II trains both jointly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.decision import Activation
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.files import expand_user
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import images_format
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.registry import create_model
from sopdeploy.seeds import derive_seed
from sopdeploy.training.loop_settings import TeacherConfig


class Loss(NamedTuple):
    """The `total` to minimize, its detached `parts` without weights, and the counts of `TrainingOutput`."""

    total: Tensor
    parts: dict[str, Tensor]
    component_counts: Tensor | None = None

    def weighted(self, share: float) -> "Loss":
        """Return the detached values times *share* in float64; the counts stay as they are."""
        parts = {name: (part * share).double() for name, part in self.parts.items()}
        return Loss((self.total.detach() * share).double(), parts, self.component_counts)


def sum_losses(losses: Sequence[Loss]) -> Loss:
    """Add up *losses*; a network may have some penalties in some of them only."""
    total = torch.stack([loss.total for loss in losses]).sum()

    parts: dict[str, Tensor] = {}
    for loss in losses:
        for name, part in loss.parts.items():
            parts[name] = parts[name] + part if name in parts else part

    counts = [loss.component_counts for loss in losses if loss.component_counts is not None]
    return Loss(total, parts, torch.stack(counts).sum(dim=0) if counts else None)


def training_loss(
    output: Tensor | TrainingOutput,
    labels: Tensor,
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
    activation: Activation = "softmax",
) -> Loss:
    """Compute alpha * main + sum of beta * branch + penalties.

    *labels* are class indices (B,), or (B, classes) with "sigmoid". *weights* are the model's
    `loss_weights()`: alpha under `main`, each beta under the name of its branch.
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


def _main_logits(output: Tensor | TrainingOutput) -> Tensor:
    """Return the logits (B, classes) of the main head in the *output* of a network."""
    return output if isinstance(output, Tensor) else output.logits


class Teacher:
    """A teacher network; with `learns` it is trained jointly, and its weights are part of the run.

    Raises `ConfigError` for one that does not fit the classes, the colors or the joint
    training.
    """

    def __init__(
        self,
        config: TeacherConfig,
        labels: tuple[str, ...],
        preprocess: Preprocess,
        label_smoothing: float,
        seed: int,
    ) -> None:
        self.config = config
        self.label_smoothing = label_smoothing
        self.learns = config.weights is None

        # A fixed teacher from a checkpoint, or one with random weights that learns jointly.
        if config.weights is not None:
            path = expand_user(config.weights)
            stored = read_checkpoint(path)
            if stored.labels != labels:
                raise ConfigError(
                    f"teacher.weights: {path} has other classes than the data; "
                    "train the teacher on the same classes"
                )
            stored_colors = (stored.preprocess.mean, stored.preprocess.std)
            if stored_colors != (preprocess.mean, preprocess.std):
                raise ConfigError(
                    f"teacher.weights: {path} normalizes colors differently; set "
                    "the same preprocess.mean and std"
                )
            self.model = build_classifier(stored, path).eval().requires_grad_(False)
        elif config.model is not None:
            torch.manual_seed(derive_seed(seed, "teacher weights"))
            self.model = create_model(
                config.model.name, num_classes=len(labels), **config.model.config
            )
        else:
            raise ConfigError(
                "teacher.weights: not set; give the checkpoint of the teacher, or "
                "teacher.model to train it"
            )

        # Only networks with a gate have this option.
        if self.learns and hasattr(self.model.config, "balance_weight"):
            raise ConfigError(
                "teacher.model: a network with a gate cannot be trained jointly; "
                "train it first and set teacher.weights"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of a teacher that learns."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state)

    def distillation_loss(
        self, loss: Loss, images: Tensor, labels: Tensor, output: Tensor | TrainingOutput
    ) -> Loss:
        """Combine the student's *loss* with the divergence of its main head from the teacher's outputs.

        The squared temperature keeps the scale of the gradient of the divergence (Hinton et al.,
        section 2). This gradient does not reach the teacher. A teacher that learns adds its own
        loss.
        """
        logits = _main_logits(output)
        temperature = self.config.temperature
        share = self.config.share

        with torch.set_grad_enabled(self.learns):
            teacher_output = self.model(
                images.contiguous(memory_format=images_format(self.model))
            )
        teacher_logits = _main_logits(teacher_output)

        # The divergence of Hinton et al., times the squared temperature.
        log_teacher = log_softmax(teacher_logits.detach().float() / temperature, dim=1)
        log_student = log_softmax(logits.float() / temperature, dim=1)
        divergence = (
            kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            * temperature**2
        )

        total = (1 - share) * loss.total + share * divergence
        parts = {**loss.parts, "teacher": divergence.detach()}

        # A teacher that learns has a loss of its own.
        if self.learns:
            weights = self.model.loss_weights()
            teacher_loss = training_loss(
                teacher_output, labels, weights, self.label_smoothing
            ).total
            total = total + teacher_loss
            parts["teacher_loss"] = teacher_loss.detach()

        return Loss(total, parts, loss.component_counts)
