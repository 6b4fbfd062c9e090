"""A trained network whose answers a run learns beside the classes; itself it learns nothing."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.learnt import TeacherChoice
from sopdeploy.losses import Loss
from sopdeploy.models.base import TrainingOutput
from sopdeploy.preprocess import Preprocess


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
