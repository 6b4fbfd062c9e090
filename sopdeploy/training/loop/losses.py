"""The training loss: weighted heads and penalties of the model, and knowledge distillation.

A teacher is trained before its student. `plugins/papers` has one that is trained jointly. Sources:
Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); Mishra and Marr, "Apprentice"
(ICLR 2018), scheme B.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from sopdeploy.base.files import expand_user
from sopdeploy.base.plugins import JOINT, TEACHERS
from sopdeploy.bundle.decision import Activation
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import images_format
from sopdeploy.models.base import Classifier, TrainingOutput
from sopdeploy.training.settings.loop import TeacherConfig
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint


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
    """A trained network that teaches, and does not change.

    `learns` tells whether the teacher of a plug-in is trained in the same run: its weights are
    then part of `last.pt`, and `own_loss` adds its loss.
    """

    learns: ClassVar[bool] = False

    def __init__(self, config: TeacherConfig, model: Classifier) -> None:
        self.config = config
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of a teacher that learns."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state)

    def own_loss(self, _output: Tensor | TrainingOutput, _labels: Tensor) -> Tensor | None:
        """Compute the loss, a scalar, of a teacher that learns by its *output* for the images of *labels*."""
        return None

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

        teacher_loss = self.own_loss(teacher_output, labels)
        if teacher_loss is not None:
            total = total + teacher_loss
            parts["teacher_loss"] = teacher_loss.detach()

        return Loss(total, parts, loss.component_counts)


def create_teacher(
    config: TeacherConfig,
    labels: tuple[str, ...],
    preprocess: Preprocess,
    label_smoothing: float,
    seed: int,
) -> Teacher:
    """Load the teacher of *config*, or create one that learns if a plug-in registers such teachers.

    Raises `ConfigError` for one that does not fit the classes, the colors or the joint training.
    """
    if config.weights is not None:
        return Teacher(config, _load_teacher(config.weights, labels, preprocess))

    if config.model is None:
        raise ConfigError(
            "teacher.weights: not set; give the checkpoint of the teacher, or "
            "teacher.model to train it"
        )

    create = TEACHERS.find(JOINT)
    if create is None:
        raise ConfigError(f"teacher.model: {TEACHERS.suggest(JOINT)}")
    teacher: Teacher = create(config, labels, label_smoothing, seed)
    return teacher


def _load_teacher(weights: Path, labels: tuple[str, ...], preprocess: Preprocess) -> Classifier:
    """Load the trained network of the checkpoint *weights*, which must fit *labels* and *preprocess*."""
    path = expand_user(weights)
    stored = read_checkpoint(path)
    if stored.labels != labels:
        raise ConfigError(
            f"teacher.weights: {path} has other classes than the data; "
            "train the teacher on the same classes"
        )

    stored_colors, colors = (
        (rules.mean, rules.std, rules.color_order) for rules in (stored.preprocess, preprocess)
    )
    if stored_colors != colors:
        raise ConfigError(
            f"teacher.weights: {path} normalizes colors differently; set "
            "the same preprocess.mean, std and color_order"
        )
    return build_classifier(stored, path).eval().requires_grad_(False)
