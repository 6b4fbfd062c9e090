"""Accuracy of every head of a network, as in DSoP's Tables III and V, Figures 4 and 5.

The heads are the network's own classifier, `main`, and the training-only ones: the branches of DSoP, the
auxiliary heads of PSDR. Export removes the training-only heads, so only a checkpoint has them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sopdeploy.config import Fraction, NonNegative, StrictModel
from sopdeploy.evaluation.metrics import TOP_K, Rate
from sopdeploy.models.base import Classifier


class HeadAccuracy(StrictModel):
    """Accuracy and loss of one head.

    `loss` is the mean cross entropy without the fitted temperature, `weight` its weight in the training loss
    (alpha of `main`, beta of a branch), `share` the head's share of the sum of weighted losses. A head is
    `constant` if it gives every image the same logits.
    """

    name: str
    top1: Rate
    top5: Rate
    loss: NonNegative
    weight: NonNegative
    share: Fraction
    constant: bool = False


def loss_shares(weights: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
    """Compute the share of each head in the sum of weighted losses; 0 for all if the sum is 0."""
    weighted = {name: weights[name] * loss for name, loss in losses.items()}
    total = sum(weighted.values())
    return {name: value / total if total else 0.0 for name, value in weighted.items()}


class HeadCounter(nn.Module):
    """Compute the main logits of *model* and count the correct predictions of all its heads.

    *targets* (N,) are the class indices of all images, in the order in which the network receives them.
    """

    def __init__(self, model: Classifier, targets: Tensor) -> None:
        super().__init__()
        self.model, self.targets, self.done = model, targets, 0
        self.right: dict[str, Tensor] = {}  # correct among the best 1 and the best 5
        self.losses: dict[str, float] = {}
        self.first: dict[str, Tensor] = {}  # logits of the first image
        self.constant: dict[str, bool] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Compute the main logits (B, C) of *images*, the next ones in the order of `targets`."""
        targets = self.targets[self.done : self.done + len(images)].to(images.device)
        self.done += len(images)
        heads: dict[str, Tensor] = self.model.heads(images)
        for name, logits in heads.items():
            top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices == targets[:, None]
            right = torch.stack([top[:, 0].sum(), top.any(dim=1).sum()]).cpu()
            self.right[name] = self.right.get(name, torch.zeros_like(right)) + right
            loss = float(cross_entropy(logits.double(), targets, reduction="sum"))
            self.losses[name] = self.losses.get(name, 0.0) + loss
            same = torch.allclose(logits, self.first.setdefault(name, logits[0]))
            self.constant[name] = self.constant.get(name, True) and same
        return heads["main"]

    def accuracies(self) -> tuple[HeadAccuracy, ...]:
        """Return the accuracies on the images so far: branches in the order of computation, then `main`."""
        weights = self.model.loss_weights()
        shares = loss_shares(weights, self.losses)
        return tuple(
            HeadAccuracy(
                name=name,
                top1=Rate.of(int(top1), self.done),
                top5=Rate.of(int(top5), self.done),
                loss=self.losses[name] / self.done,
                weight=weights[name],
                share=shares[name],
                constant=self.constant[name],
            )
            for name, (top1, top5) in self.right.items()
        )
