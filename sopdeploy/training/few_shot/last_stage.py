"""Fine-tuning of the last stage of a network from cached inputs of that stage.

Batch norm uses its running statistics and dropout is off: with few images, statistics of a batch would change
the features more than training does. In new parts, the running statistics are those of the training images.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sopdeploy.data.base import derive_seed
from sopdeploy.decision import Activation
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.training.few_shot.config import FineTuningConfig
from sopdeploy.training.few_shot.features import last_stage
from sopdeploy.training.few_shot.head import LinearHead
from sopdeploy.training.few_shot.tails import Tail, measure_statistics
from sopdeploy.training.fine_tuning import classifier_name

NEW_FACTOR = 10.0  # as `start.head_factor` of the recipe photos
EVAL_BATCH = 64


def set_head(model: Classifier, head: LinearHead) -> None:
    """Write *head* to the classifier of *model*."""
    layer = model.get_submodule(classifier_name(model))
    with torch.no_grad():
        for parameter, value in ((layer.weight, head.weight), (layer.bias, head.bias)):
            parameter.copy_(torch.from_numpy(value))  # type: ignore[operator]


def layer_groups(
    tail: Classifier, config: FineTuningConfig, new: Sequence[str] = ()
) -> list[dict[str, object]]:
    """Build AdamW's parameter groups of the last stage and what follows it.

    The classifier, the layers after the stage and its last block have the rate `lr`, each earlier block
    `decay` times that of the next one, and the parts *new* `NEW_FACTOR` times `lr`.
    """
    stage = last_stage(tail)
    blocks = [f"{stage}.{name}" for name, _ in tail.get_submodule(stage).named_children()]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in tail.named_parameters():
        depth = next((len(blocks) - 1 - i for i, block in enumerate(blocks) if is_in(name, block)), 0)
        factor = NEW_FACTOR if is_in(name, *new) else config.decay**depth
        groups.setdefault(config.lr * factor, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


@dataclass(frozen=True, slots=True)
class StageData:
    """Cached `inputs` (N, 2, C, H, W) of the stage, `targets` (N, C) in [0, 1], `weights` (N,), float32."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    activation: Activation


class LastStageTrainer:
    """Train a copy of *tail* on the images *fitted* (indices), starting from *head*, epoch by epoch.

    Each epoch uses one random view of each image. The loss is the weighted sum of the losses of all heads, as
    in the training loop. Random numbers are functions of (seed, epoch).
    """

    def __init__(
        self,
        tail: Tail,
        head: LinearHead,
        fitted: NDArray[np.intp],
        data: StageData,
        config: FineTuningConfig,
        seed: int,
    ) -> None:
        self.model = copy.deepcopy(tail.model).eval().requires_grad_(True)
        set_head(self.model, LinearHead(head.weight / tail.scale, head.bias))
        if tail.new:
            measure_statistics(self.model, tail.new, data.inputs[torch.from_numpy(fitted), 0])
        self.device = next(self.model.parameters()).device
        self.data, self.fitted, self.config, self.seed = data, fitted, config, seed
        self.optimizer = torch.optim.AdamW(layer_groups(self.model, config, tail.new))
        self.factors = self.model.loss_weights()
        self.epoch = 0

    def train_epoch(self) -> float:
        """Train one epoch and return its mean loss."""
        random = np.random.default_rng(derive_seed(self.seed, "few-shot", self.epoch))
        order = random.permutation(self.fitted)
        view = torch.from_numpy(random.integers(0, self.data.inputs.shape[1], len(order)))
        total = 0.0
        steps = -(-len(order) // self.config.batch_size)
        for part in np.array_split(np.arange(len(order)), steps):
            chosen = torch.from_numpy(order[part])
            heads = self.model.heads(self.data.inputs[chosen, view[part]].to(self.device))
            targets = self.data.targets[chosen].to(self.device)
            weights = self.data.weights[chosen].to(self.device)
            losses = [
                self.factors[name] * (sample_losses(logits, targets, self.data.activation) * weights).sum()
                for name, logits in heads.items()
            ]
            loss = torch.stack(losses).sum() / weights.sum()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += float(loss.detach()) * len(part)
        self.epoch += 1
        return total / len(order)

    @torch.no_grad()
    def logits(self, images: NDArray[np.intp]) -> NDArray[np.float64]:
        """Compute the logits (N, C) float64 of the first view of *images*."""
        parts = torch.split(self.data.inputs[torch.from_numpy(images), 0], EVAL_BATCH)
        found = [self.model(part.to(self.device)).double().cpu() for part in parts]
        return torch.cat(found).numpy() if found else np.zeros((0, self.data.targets.shape[1]))


def sample_losses(logits: Tensor, targets_NC: Tensor, activation: Activation) -> Tensor:
    """Compute the loss (N,) of each image, as `head.loss_and_gradient` does."""
    if activation == "sigmoid":
        return binary_cross_entropy_with_logits(logits, targets_NC, reduction="none").sum(dim=1)
    return cross_entropy(logits, targets_NC, reduction="none")
