"""Evaluation of networks: metrics during training, and per-image scores.

`HeadCounter` measures every head of a network, as in DSoP's Tables III and V, Figures 4 and 5. The heads are
the network's own classifier, `main`, and the training-only ones: the branches of DSoP, the auxiliary heads of
PSDR. Export removes the training-only heads, so only a checkpoint has them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import Fraction, NonNegative, StrictModel
from sopdeploy.data.base import Dataset, LabeledImages, PreprocessedDataset
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.decision import Activation, Decision, sigmoid
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.metrics import NO_IMAGES, TOP_K, Rate
from sopdeploy.evaluation.multi_label import (
    DEFAULT_THRESHOLD,
    MultiLabelMetrics,
    MultiLabelPredictions,
    fit_thresholds,
)
from sopdeploy.evaluation.predictions import Predictions, make_predictions
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier

SCORE_BATCH = 32  # images


class ProcessGroup:
    """The `world` processes that compute together, seen by process `rank` (from 0).

    The base class is a single process.
    """

    rank = 0
    world = 1

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum *values* over the processes; the sum is on the device of *values*."""
        return values


class EvalMetrics(StrictModel):
    """Top-1 and top-5 accuracy and mean loss over `count` images.

    With fewer than five classes `top5` covers all of them.
    """

    score_name: ClassVar[str] = "top-1"
    top1: Fraction
    top5: Fraction
    count: int
    loss: float

    @property
    def score(self) -> float:
        """The top-1 accuracy, which selects the best epoch."""
        return self.top1


HeldOutMetrics = EvalMetrics | MultiLabelMetrics


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    activation: Activation,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of *logits* (B, C) over the images of a batch.

    With "softmax", the cross entropy with *labels* (B,) int64; with "sigmoid", the binary cross
    entropy with *labels* (B, C) in [0, 1], averaged over the classes. *label_smoothing* is the fraction by
    which labels move towards 1 / C ("softmax") or 0.5 ("sigmoid").
    """
    if activation == "softmax":
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return binary_cross_entropy_with_logits(logits, targets)


def evaluate_network(
    model: nn.Module, dataset: PreprocessedDataset, preprocess: Preprocess, **options: Any
) -> HeldOutMetrics:
    """Evaluate the main head of *model* on *dataset*, on the device of the model.

    *options* are those of `predict_logits`. The model is in eval mode during the evaluation. Raises
    `DataError` if there are no images, `TrainingError` if the loss is not finite.
    """
    if not len(dataset):
        raise DataError(NO_IMAGES)
    was_training = model.training
    model.eval()
    try:
        logits, targets = predict_logits(model, dataset, preprocess, **options)
    finally:
        model.train(was_training)
    return held_out_metrics(dataset.labels, logits, targets)


def held_out_metrics(
    labels: tuple[str, ...], logits: NDArray[np.float64], targets: NDArray[np.int64] | NDArray[np.float32]
) -> HeldOutMetrics:
    """Compute the metrics of *logits* (N, C) for *targets*, (N,) or (N, C); F1 is at a threshold of 0.5.

    Raises `TrainingError` if the loss is not finite.
    """
    activation: Activation = "sigmoid" if targets.ndim == 2 else "softmax"
    logits_NC, labels_N = torch.from_numpy(logits), torch.from_numpy(targets)
    loss = float(classification_loss(logits_NC, labels_N, activation))
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss on the held-out images is not finite, training has diverged; lower the learning rate"
        )
    if activation == "softmax":
        right = logits_NC.topk(min(5, len(labels)), dim=1).indices == labels_N[:, None]
        top1, top5 = int(right[:, 0].sum()) / len(right), int(right.any(dim=1).sum()) / len(right)
        return EvalMetrics(top1=top1, top5=top5, count=len(right), loss=loss)
    half, probabilities = [DEFAULT_THRESHOLD] * len(labels), sigmoid(logits)
    report = MultiLabelPredictions(
        labels=labels, targets=targets.astype(np.float64), probabilities=probabilities, thresholds=half
    ).report()
    return MultiLabelMetrics(
        **report.model_dump(include={"map", "macro_f1", "micro_f1", "count"}),
        loss=loss,
        thresholds=fit_thresholds(targets.astype(np.float64), probabilities),
    )


def _process_logits(
    model: nn.Module,
    dataset: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    workers: int,
    processes: ProcessGroup,
) -> Iterator[tuple[list[int], Tensor] | None]:
    """Yield the indices and the logits (B, C) float64 of each batch of this process.

    All processes yield the same number of times; a process that has no batch left yields None.
    """
    device = next(model.parameters()).device
    normalize = Normalize(preprocess).to(device)
    images_here = range(processes.rank, len(dataset), processes.world)
    positions = sequential_batches(len(images_here), batch_size)
    batches = [[images_here[position] for position in batch] for batch in positions]
    for indices, (images, _) in zip(batches, load_batches(dataset, batches, workers, device), strict=True):
        yield indices, model(normalize(images)).double()
    rounds = -(-len(dataset) // (batch_size * processes.world))
    yield from [None] * (rounds - len(batches))


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    dataset: PreprocessedDataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int = 0,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Compute the logits (N, C) of *model* on *dataset*; return them and the targets of its images.

    The model must be in eval mode. Each of *processes* computes a different part of the images; each returns
    the logits of all images. *on_batch* is called after every batch with the number of images done, the same
    number of times in each process.
    """
    computed: list[tuple[list[int], Tensor]] = []  # indices and logits of this process's batches
    batches = _process_logits(model, dataset, preprocess, batch_size, workers, processes)
    for done, batch in enumerate(batches, 1):
        if batch is not None:
            indices, batch_logits = batch
            computed.append((indices, batch_logits.cpu()))
        on_batch(min(len(dataset), done * batch_size * processes.world))
    classes = computed[0][1].shape[1] if computed else len(dataset.labels)
    logits = torch.zeros(len(dataset), classes, dtype=torch.float64)
    for indices, batch_logits in computed:
        logits[indices] = batch_logits
    # the rows of other processes are 0, so the sum holds all rows
    return processes.all_reduce(logits).numpy(), dataset.images.targets


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


def predict_images(
    model: nn.Module,
    checkpoint: Checkpoint,
    images: LabeledImages,
    *,
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Predictions:
    """Predict *images* with *model*, the network of *checkpoint* in eval mode; it stays on its device.

    The temperature divides the logits, as in an exported bundle.
    """
    logits_NC = score_images(model, checkpoint.preprocess, images, workers=workers, on_image=on_image)
    decision = checkpoint.decision or Decision()
    return make_predictions(logits_NC / decision.temperature, images, checkpoint.labels, decision)


def score_images(
    model: nn.Module,
    preprocess: Preprocess,
    images: LabeledImages,
    *,
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> NDArray[np.float64]:
    """Compute the logits (N, C) of *model* on *images*; raise `TrainingError` if one is not finite.

    *on_image* receives the numbers of images done and in total.
    """
    logits_NC, _ = predict_logits(
        model,
        PreprocessedDataset(images, preprocess),
        preprocess,
        batch_size=SCORE_BATCH,
        workers=workers,
        on_batch=lambda done: on_image(done, len(images)),
    )
    if not np.isfinite(logits_NC).all():
        raise TrainingError("the logits are not finite; train again with a lower learning rate")
    return logits_NC
