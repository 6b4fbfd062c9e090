"""A teacher that is trained jointly with its student, from random weights.

DSoP's Table II trains both jointly. Source: Mishra and Marr, "Apprentice" (ICLR 2018), scheme A.
"""

from typing import ClassVar

import torch
from torch import Tensor

from sopdeploy.base.seeds import derive_seed
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.registry import create_model
from sopdeploy.training.loop.losses import Teacher, training_loss
from sopdeploy.training.settings.loop import TeacherConfig


class JointTeacher(Teacher):
    """The network `teacher.model` with random weights of *seed*, whose own loss is added.

    Raises `ConfigError` for a network with a gate.
    """

    learns: ClassVar[bool] = True

    def __init__(
        self, config: TeacherConfig, labels: tuple[str, ...], label_smoothing: float, seed: int
    ) -> None:
        if config.model is None:
            raise ConfigError("teacher.model: not set; name the network of the teacher")

        torch.manual_seed(derive_seed(seed, "teacher weights"))
        model = create_model(config.model.name, num_classes=len(labels), **config.model.config)
        if hasattr(
            model.config, "balance_weight"
        ):  # only networks with a gate have this option
            raise ConfigError(
                "teacher.model: a network with a gate cannot be trained jointly; "
                "train it first and set teacher.weights"
            )

        super().__init__(config, model)
        self.label_smoothing = label_smoothing

    def own_loss(self, output: Tensor | TrainingOutput, labels: Tensor) -> Tensor:
        """Compute the loss of the teacher's heads by its *output*."""
        weights = self.model.loss_weights()
        return training_loss(output, labels, weights, self.label_smoothing).total
