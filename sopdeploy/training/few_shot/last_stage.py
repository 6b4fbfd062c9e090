"""Fine-tuning of the last stage of a network from cached inputs of that stage.

Batch norm uses its running statistics and dropout is off: with few images, statistics of a batch would change
the features more than training does.
"""

import copy
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
from sopdeploy.training.few_shot.features import last_stage, record_input
from sopdeploy.training.few_shot.head import LinearHead
from sopdeploy.training.fine_tuning import classifier_name

TOLERANCE = 1e-3  # of the largest feature: the tail must compute the features of the whole network
EVAL_BATCH = 64


def cut_before_last_stage(model: Classifier, stage_input: Tensor, vector: Tensor) -> Classifier | None:
    """Copy *model* so that its copy computes logits from the input of the last stage.

    What runs before that stage is replaced by identities. *stage_input* (B, C, H, W) and *vector* (B, D) are
    those of the whole network: `None` if the copy does not reproduce them, because the network computes more
    than its modules do.
    """
    tail, stage = copy.deepcopy(model), last_stage(model)
    parent: nn.Module = tail
    for name in stage.split("."):
        for child in list(parent._modules):
            if child == name:
                break
            if not is_in(classifier_name(model), child):
                empty = isinstance(parent._modules[child], nn.Sequential) and parent is tail
                parent._modules[child] = nn.Sequential() if empty else nn.Identity()
        parent = parent.get_submodule(name)
    try:
        with torch.no_grad(), record_input(tail.get_submodule(classifier_name(tail))) as found:
            tail.eval()(stage_input.clone())
    except (RuntimeError, AttributeError, TypeError, IndexError):
        return None
    same = found and torch.allclose(found[0], vector, rtol=0, atol=TOLERANCE * float(vector.abs().max()))
    return tail if same else None


def set_head(model: Classifier, head: LinearHead) -> None:
    """Write *head* to the classifier of *model*."""
    layer = model.get_submodule(classifier_name(model))
    with torch.no_grad():
        for parameter, value in ((layer.weight, head.weight), (layer.bias, head.bias)):
            parameter.copy_(torch.from_numpy(value))  # type: ignore[operator]


def layer_groups(tail: Classifier, config: FineTuningConfig) -> list[dict[str, object]]:
    """Build AdamW's parameter groups of the last stage and what follows it, and freeze everything else.

    The classifier, the layers after the stage and its last block have the rate `lr`, each earlier block
    `decay` times that of the next one.
    """
    stage, trained = last_stage(tail), set(tail._modules) - set(tail.training_only)
    blocks = [f"{stage}.{name}" for name, _ in tail.get_submodule(stage).named_children()]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in tail.named_parameters():
        parameter.requires_grad_(is_in(name, *trained))
        if not parameter.requires_grad:
            continue
        depth = next((len(blocks) - 1 - i for i, block in enumerate(blocks) if is_in(name, block)), 0)
        groups.setdefault(config.lr * config.decay**depth, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


@dataclass(frozen=True, slots=True)
class StageData:
    """Cached `inputs` (N, 2, C, H, W) of the stage, `targets` (N, C) in 0..1 and `weights` (N,), float32."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    activation: Activation


class LastStageTrainer:
    """Train a copy of *tail* on the images *fitted* (indices), starting from *head*, epoch by epoch.

    A view of each image is drawn per epoch. Random numbers are functions of (seed, epoch).
    """

    def __init__(
        self,
        tail: Classifier,
        head: LinearHead,
        data: StageData,
        fitted: NDArray[np.intp],
        config: FineTuningConfig,
        seed: int,
    ) -> None:
        self.model = copy.deepcopy(tail).eval()
        set_head(self.model, head)
        self.device = next(self.model.parameters()).device
        self.data, self.fitted, self.config, self.seed = data, fitted, config, seed
        self.optimizer = torch.optim.AdamW(layer_groups(self.model, config))
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
            logits = self.model(self.data.inputs[chosen, view[part]].to(self.device))
            losses = sample_losses(logits, self.data.targets[chosen].to(self.device), self.data.activation)
            weights = self.data.weights[chosen].to(self.device)
            loss = (losses * weights).sum() / weights.sum()
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


def copy_tail(tail: Classifier, model: Classifier) -> None:
    """Copy the trained parameters of *tail*, a cut copy of *model*, to *model*."""
    own = model.state_dict()
    trained = {name for name, parameter in tail.named_parameters() if parameter.requires_grad}
    weights = tail.state_dict()
    model.load_state_dict({**own, **{name: weights[name] for name in trained}})
