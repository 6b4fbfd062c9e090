"""Accuracy of every head of a network on a folder of images, as in DSoP's Tables III and V, Figures 4 and 5.

The heads are the network's own classifier, `main`, and the training-only ones: the branches of DSoP, the
auxiliary heads of PSDR. Export removes the training-only heads, so only a checkpoint has them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.config import Fraction, NonNegative, StrictModel
from sopdeploy.data.folders import Log, ignore
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.metrics import TOP_K, Rate
from sopdeploy.evaluation.prediction import open_images_of, predict_images
from sopdeploy.evaluation.predictions import Predictions
from sopdeploy.models.base import Classifier


class HeadAccuracy(StrictModel):
    """Accuracy and loss of one head.

    `loss` is the mean cross entropy without the fitted temperature, `weight` its weight in the training loss
    (alpha of `main`, beta of a branch), `share` the head's share of the sum of weighted losses.
    """

    name: str
    top1: Rate
    top5: Rate
    loss: NonNegative
    weight: NonNegative
    share: Fraction


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
        self.right: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}

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
        return heads["main"]

    def accuracies(self) -> tuple[HeadAccuracy, ...]:
        """Return the accuracies on the images so far: branches in the order of computation, then `main`."""
        weights = self.model.loss_weights()
        shares = loss_shares(weights, self.losses)
        return tuple(
            HeadAccuracy(
                name=name,
                top1=Rate.of(int(right[0]), self.done),
                top5=Rate.of(int(right[1]), self.done),
                loss=self.losses[name] / self.done,
                weight=weights[name],
                share=shares[name],
            )
            for name, right in self.right.items()
        )


def score_heads(
    path: Path, data: Path, *, workers: int = 0, on_image: Callable[[int, int], None], log: Log = ignore
) -> tuple[tuple[str, ...], Predictions, tuple[HeadAccuracy, ...]]:
    """Score all heads of the checkpoint at *path* on the images below *data* in one pass.

    Returns the sorted class names and the scores of the exported network, as `score_checkpoint` does, and
    the accuracy of every head. Raises `ConfigError` for a network that predicts several classes per image.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.decision is not None and checkpoint.decision.thresholds:
        raise ConfigError(f"{path} predicts several classes per image; omit it", setting="heads")
    images = open_images_of(checkpoint, data, log)
    columns = [checkpoint.labels.index(images.labels[target]) for target in images.targets]
    model = build_classifier(checkpoint, path).to("cuda" if torch.cuda.is_available() else "cpu")
    counter = HeadCounter(model, torch.tensor(columns))
    try:
        scores = predict_images(counter.eval(), checkpoint, images, workers=workers, on_image=on_image)
    except DataError as error:
        raise unreadable_images_error(error, images) from None
    return images.labels, scores, counter.accuracies()
