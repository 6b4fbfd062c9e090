"""Evaluation of networks: metrics during training, and per-image scores.

`AllHeads` computes every head of a network, as in DSoP's Table III and Figure 5. The heads are
the network's own classifier, `main`, and the training-only ones: the branches of DSoP, the
auxiliary heads. Export removes the training-only heads, so only a checkpoint has them.
"""

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.bundle.decision import Activation, sigmoid
from sopdeploy.data.batches import Loader, load_batches, sequential_batches
from sopdeploy.data.photos.file_checks import unreadable_images_error
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.decision_fit import fit_thresholds
from sopdeploy.evaluation.metrics import NO_IMAGES, TOP_K
from sopdeploy.evaluation.multi_label import (
    DEFAULT_THRESHOLD,
    MultiLabelMetrics,
    MultiLabelPredictions,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
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
        return values  # of the single process


class EvalMetrics(StrictModel):
    """Top-1 and top-5 accuracy, and mean loss over `count` images; with fewer classes, top-5 is of all."""

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
    logits: Tensor, labels: Tensor, activation: Activation, *, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the loss of *logits* (B, C) over the images of a batch.

    With "softmax", the cross entropy with *labels* (B,) int64; with "sigmoid", the binary cross
    entropy with *labels* (B, C) in [0, 1], averaged over the classes. Both are means over the
    batch. *label_smoothing* is the fraction by which labels move towards 1 / C ("softmax") or
    0.5 ("sigmoid").
    """
    if activation == "softmax":
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return binary_cross_entropy_with_logits(logits, targets)


def evaluate_network(
    model: nn.Module, dataset: PreprocessedDataset, preprocess: Preprocess, **options: Any
) -> HeldOutMetrics:
    """Evaluate the main head of *model* on *dataset*, on the device of the model.

    Raises `DataError` without images, `TrainingError` if the loss is not finite. The *options*
    are those of `predict_logits`.
    """
    if not len(dataset):
        raise DataError(NO_IMAGES)
    logits, targets = predict_logits(model, dataset, preprocess, **options)
    return held_out_metrics(dataset.images.labels, logits, targets)


def held_out_metrics(
    labels: tuple[str, ...],
    logits: NDArray[np.float64],
    targets: NDArray[np.int64] | NDArray[np.float32],
) -> HeldOutMetrics:
    """Compute the metrics of *logits* (N, C) for *targets*, (N,) or (N, C).

    With (N, C), F1 is at a threshold of 0.5, and `thresholds` are fitted to *targets*. Raises
    `TrainingError` if the loss is not finite, `DataError` if no image shows any class of (N,
    C).
    """
    activation: Activation = "sigmoid" if targets.ndim == 2 else "softmax"
    logits_NC = torch.from_numpy(logits)
    true = torch.from_numpy(targets)
    loss = float(classification_loss(logits_NC, true, activation))
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss on the validation images is not finite, so training has "
            "diverged; lower the learning rate"
        )

    if activation == "softmax":
        # Which of the five best answers are right, (N, 5).
        right = logits_NC.topk(min(TOP_K, logits.shape[1]), dim=1).indices == true[:, None]
        top1 = int(right[:, 0].sum()) / len(right)
        top5 = int(right.any(dim=1).sum()) / len(right)
        return EvalMetrics(top1=top1, top5=top5, count=len(right), loss=loss)

    # With several classes per image, metrics at a fixed threshold, and the thresholds that
    # maximize F1 on these images.
    probabilities = sigmoid(logits)
    predictions = MultiLabelPredictions(
        labels=labels,
        targets=targets.astype(np.float64),
        probabilities=probabilities,
        thresholds=[DEFAULT_THRESHOLD] * len(labels),
    )
    report = predictions.report()
    return MultiLabelMetrics(
        **report.model_dump(include={"map", "macro_f1", "micro_f1", "count"}),
        loss=loss,
        thresholds=fit_thresholds(targets.astype(np.float64), probabilities),
    )


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    dataset: PreprocessedDataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int | Loader = 0,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Compute the logits (N, C) of *model* on *dataset*; return them and the targets of its images.

    The model is in eval mode meanwhile. Each of *processes* computes a different part of the
    images, in batches of *batch_size* that *workers* load (`load_batches`); each returns the
    logits of all images. In a round, every process computes a batch, if it has images left, and
    calls *on_batch* with the number of images that all processes have done.
    """
    device = next(model.parameters()).device
    was_training = model.training

    normalize = Normalize(preprocess, images_format(model)).to(device)
    # Every process takes every n-th image: of two, one takes 0, 2, ... and the other 1, 3, ...
    images_here = range(processes.rank, len(dataset), processes.world)

    positions_by_batch = sequential_batches(len(images_here), batch_size)
    batches = [
        [images_here[position] for position in positions] for positions in positions_by_batch
    ]

    # Process 0 has a batch in each round.
    images_per_round = batch_size * processes.world
    rounds = range(1, math.ceil(len(dataset) / images_per_round) + 1)

    computed: list[Tensor] = []
    model.eval()
    try:
        loader = load_batches(dataset, batches, workers, device)
        for finished_rounds, batch in zip_longest(rounds, loader):
            # There is no batch in the last round if only other processes have images left.
            if batch is not None:
                computed.append(model(normalize(batch[0])).double().cpu())
            on_batch(min(len(dataset), finished_rounds * images_per_round))
    finally:
        model.train(was_training)

    # Without images in this process, no logits show the number of classes.
    num_classes = computed[0].shape[1] if computed else len(dataset.images.labels)
    logits = torch.zeros(len(dataset), num_classes, dtype=torch.float64)
    if computed:
        # These are the rows of `images_here`.
        logits[processes.rank :: processes.world] = torch.cat(computed)

    # The rows of other processes are 0, so the sum holds all rows.
    return processes.all_reduce(logits).numpy(), dataset.images.targets


class Mirrored(nn.Module):
    """Compute the mean logits of images and their mirror images; *model* may be `AllHeads` of a network.

    Source: the evaluation of fine-grained classes in the code of fast-MPN-COV.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # the mode that `predict_logits` restores

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, C) of normalized (B, 3, H, W) images."""
        logits: Tensor = (self.model(images) + self.model(images.flip(3))) / 2
        return logits


def as_evaluated(model: nn.Module, *, mirror: bool) -> nn.Module:
    """Return *model*, with *mirror* as `Mirrored`."""
    return Mirrored(model) if mirror else model


class AllHeads(nn.Module):
    """Compute the logits of all H heads of *model*, joined to (B, H * C)."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # the mode that `predict_logits` restores
        self.names: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of *images*, and set `names`: branches in computation order, then `main`."""
        heads: dict[str, Tensor] = self.model.heads(images)
        self.names = tuple(heads)
        return torch.cat(list(heads.values()), dim=1)

    def split(self, logits: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Divide *logits* (N, H * C), which `forward` has computed, into the logits of each head, (N, C)."""
        return dict(zip(self.names, np.split(logits, len(self.names), axis=1), strict=True))


def score_images(
    model: nn.Module,
    preprocess: Preprocess,
    images: LabeledImages,
    *,
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> NDArray[np.float64]:
    """Compute the logits (N, C) of *model* on *images*; raise `TrainingError` if one is not finite.

    *on_image* receives the numbers of images done and in total. A `DataError` names all
    unreadable images.
    """
    try:
        logits_NC, _ = predict_logits(
            model,
            PreprocessedDataset(images, preprocess),
            preprocess,
            batch_size=SCORE_BATCH,
            workers=workers,
            on_batch=lambda done: on_image(done, len(images)),
        )
    except DataError as error:
        raise unreadable_images_error(error, images) from None

    if not np.isfinite(logits_NC).all():
        raise TrainingError("the logits are not finite; train again with a lower learning rate")
    return logits_NC


def predict_unknown(
    model: nn.Module, images: LabeledImages | None, preprocess: Preprocess, workers: int
) -> NDArray[np.float64] | None:
    """Compute the logits (M, C) of *model* on the *images* of none of its classes; None without any."""
    return None if images is None else score_images(model, preprocess, images, workers=workers)
