"""Evaluation of networks: metrics during training, and per-image scores of a checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import Fraction, StrictModel
from sopdeploy.data.base import ImagesDataset, LabeledImages, PreprocessedDataset, Target
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.data.folder_store import Log, ignore
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.decision import Activation, Decision
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.metrics import NO_IMAGES, Score
from sopdeploy.evaluation.multi_label import (
    DEFAULT_THRESHOLD,
    MultiLabelMetrics,
    MultiLabelPredictions,
    fit_presence,
)
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.images.tta import TtaMode, check_tta_mode, tta_views
from sopdeploy.layers.normalize import Normalize

SCORE_BATCH = 32  # images, each with up to ten views


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
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Compute the loss of *logits* (B, C) over the images of a batch.

    With "softmax", the cross entropy with *labels* (B,) int64 or (B, C); with "sigmoid", the binary cross
    entropy with *labels* (B, C) in [0, 1], averaged over the classes. *label_smoothing* is the fraction by
    which labels move towards 1 / C ("softmax") or 0.5 ("sigmoid").
    """
    if activation == "softmax":
        return cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    return losses.mean() if reduction == "mean" else losses.sum()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PreprocessedDataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int = 0,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> HeldOutMetrics:
    """Evaluate the main head of *model* on *dataset*, on the device of the model.

    Each of *processes* evaluates a different part of the images; each returns the metrics of all images.
    *on_batch* is called after every batch with the number of images done, the same number of times in each
    process. The model is in eval mode during the evaluation. Raises `DataError` if there are no images,
    `TrainingError` if the loss is not finite.
    """
    if not len(dataset):
        raise DataError(NO_IMAGES)
    activation: Activation = "sigmoid" if dataset.images.targets.ndim == 2 else "softmax"
    loss, counts = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    classes = len(dataset.labels) if activation == "sigmoid" else 0
    predictions = torch.zeros(2, len(dataset), classes, dtype=torch.float64)
    step, was_training = batch_size * processes.world, model.training
    model.eval()
    try:
        for done, batch in enumerate(
            _own_logits(model, dataset, preprocess, batch_size, workers, processes), 1
        ):
            if batch is not None:
                indices, logits, labels = batch
                loss += classification_loss(logits, labels, activation, reduction="sum").cpu()
                if activation == "softmax":
                    top = (logits.topk(min(k, logits.shape[1]), dim=1).indices for k in (1, 5))
                    counts += torch.tensor([int((classes == labels[:, None]).sum()) for classes in top])
                else:
                    predictions[:, indices] = torch.stack([labels.double(), logits.sigmoid()]).cpu()
            on_batch(min(len(dataset), done * step))
    finally:
        model.train(was_training)
    mean_loss, count = float(processes.all_reduce(loss)) / len(dataset), len(dataset)
    if not math.isfinite(mean_loss):
        raise TrainingError(
            "the loss on the held-out images is not finite, training has diverged; lower the learning rate"
        )
    if activation == "sigmoid":
        targets, probabilities = processes.all_reduce(predictions).numpy()
        return multi_label_metrics(dataset.labels, targets, probabilities, mean_loss)
    top1, top5 = processes.all_reduce(counts).tolist()
    return EvalMetrics(top1=top1 / count, top5=top5 / count, count=count, loss=mean_loss)


def _own_logits(
    model: nn.Module,
    dataset: PreprocessedDataset,
    preprocess: Preprocess,
    batch_size: int,
    workers: int,
    processes: ProcessGroup,
) -> Iterator[tuple[list[int], Tensor, Tensor] | None]:
    """Yield the indices, logits (B, C) float64 and labels of each batch of this process.

    All processes yield the same number of times; a process that has no batch left yields None.
    """
    device = next(model.parameters()).device
    normalize = Normalize(preprocess).to(device)
    own = range(processes.rank, len(dataset), processes.world)
    batches = [[own[index] for index in batch] for batch in sequential_batches(len(own), batch_size)]
    for indices, (images, labels) in zip(
        batches, load_batches(dataset, batches, workers, device), strict=True
    ):
        yield indices, model(normalize(images)).double(), labels
    rounds = -(-len(dataset) // (batch_size * processes.world))
    yield from [None] * (rounds - len(batches))


def multi_label_metrics(
    labels: tuple[str, ...], targets: NDArray[np.float64], probabilities: NDArray[np.float64], loss: float
) -> MultiLabelMetrics:
    """Compute the metrics of *probabilities* (N, C) for *targets* (N, C), with F1 at a threshold of 0.5."""
    half = [DEFAULT_THRESHOLD] * len(labels)
    predictions = MultiLabelPredictions(
        labels=labels, targets=targets, probabilities=probabilities, thresholds=half
    )
    fitted = fit_presence(targets, probabilities)
    return MultiLabelMetrics(
        **predictions.report().model_dump(include={"map", "macro_f1", "micro_f1", "count"}),
        loss=loss,
        thresholds=fitted.thresholds,
        present=fitted.reference,
    )


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    dataset: PreprocessedDataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda _done: None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute the logits (N, C) of *model* on *dataset*; return them and the targets of its images.

    The model must be in eval mode. *on_batch* receives the number of images done after every batch.
    """
    logits, targets = [], []
    batches = _own_logits(model, dataset, preprocess, batch_size, workers, ProcessGroup())
    for _, of_batch, labels in filter(None, batches):
        logits.append(of_batch.cpu())
        targets.append(labels.cpu())
        on_batch(sum(map(len, targets)))
    return torch.cat(logits).numpy(), torch.cat(targets).numpy()


def score_checkpoint(
    path: Path,
    data: Path,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None],
    log: Log = ignore,
) -> tuple[tuple[str, ...], list[Score] | MultiLabelPredictions]:
    """Score the checkpoint at *path* on the images below *data*, one subfolder per class or `labels.csv`.

    Returns the sorted class names and one score per image or, for a multi-label network, all its predictions
    of the classes in output order. *on_image* receives the numbers of images done and in total, *log* lines
    about the folder.
    """
    checkpoint = read_checkpoint(path)
    thresholds = checkpoint.decision.thresholds if checkpoint.decision is not None else None
    labels = checkpoint.labels if thresholds else tuple(sorted(checkpoint.labels))
    images = open_evaluation_images(data, labels, multi_label=bool(thresholds), log=log)
    if warning := checkpoint.trained_on(images):
        log(f"{data}: {warning}")
    model = build_classifier(checkpoint, path).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return images.labels, predict_checkpoint(
            model, checkpoint, images, tta=tta, workers=workers, on_image=on_image
        )
    except DataError as error:
        raise unreadable_images_error(error, images) from None


def predict_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, images: LabeledImages, **options: Any
) -> list[Score] | MultiLabelPredictions:
    """Predict *images* with *model*, the network of *checkpoint*: `score_images`, or `predict_images`.

    *options* are those of both.
    """
    thresholds = checkpoint.decision.thresholds if checkpoint.decision is not None else None
    if thresholds is None:
        return score_images(model, checkpoint, images, **options)
    return predict_images(model, thresholds, images, checkpoint.preprocess, **options)


@torch.no_grad()
def score_images(
    model: nn.Module,
    checkpoint: Checkpoint,
    images: LabeledImages,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Score]:
    """Score *model*, the network of *checkpoint*, on *images*; classes are matched by name.

    The temperature divides the logits, as in an exported bundle. Probabilities are averaged over the views of
    *tta*; a rejection threshold applies to single views only. The model must be in eval mode.
    """
    preprocess, decision = checkpoint.preprocess, checkpoint.decision or Decision()
    columns = [images.labels.index(label) for label in checkpoint.labels]
    dataset = _TtaDataset(images, preprocess, check_tta_mode(tta, preprocess))
    scores: list[Score] = []
    for unscaled, targets in _view_logits(model, dataset, workers):
        logits = unscaled / decision.temperature
        probabilities = logits.softmax(dim=2).mean(dim=1)
        # logits also rank classes whose probabilities are rounded to 0
        ranking = logits[:, 0] if logits.shape[1] == 1 else probabilities
        rankings = ranking.argsort(dim=1, descending=True, stable=True).tolist()
        for image, (target, ranked, row) in enumerate(
            zip(targets.tolist(), rankings, probabilities.tolist(), strict=True)
        ):
            review = decision.review(logits[image, 0].cpu().numpy()) if logits.shape[1] == 1 else {}
            ranking_of_image = [(columns[column], row[column]) for column in ranked]
            scores.append(Score.from_ranking(target, ranking_of_image, **review))
        on_image(len(scores), len(dataset))
    return scores


@torch.no_grad()
def predict_images(
    model: nn.Module,
    thresholds: Sequence[float],
    images: LabeledImages,
    preprocess: Preprocess,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> MultiLabelPredictions:
    """Predict any number of classes per image; *model* has one output per label of *images*.

    Probabilities are averaged over the views of *tta*. The model must be in eval mode; it stays on its
    device.
    """
    dataset = _TtaDataset(images, preprocess, check_tta_mode(tta, preprocess))
    probabilities: list[Tensor] = []
    for logits, _ in _view_logits(model, dataset, workers):
        probabilities += logits.sigmoid().mean(dim=1).cpu()
        on_image(len(probabilities), len(dataset))
    return MultiLabelPredictions(
        labels=images.labels,
        targets=images.targets.astype(np.float64),
        probabilities=torch.stack(probabilities).numpy(),
        thresholds=thresholds,
    )


def _view_logits(model: nn.Module, dataset: "_TtaDataset", workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (B, V, C) float64 of the views of *dataset*, and the labels, by batches."""
    device = next(model.parameters()).device
    normalize = Normalize(dataset.preprocess).to(device)
    batches = sequential_batches(len(dataset), SCORE_BATCH)
    for views, targets in load_batches(dataset, batches, workers, device):
        logits = model(normalize(views.flatten(end_dim=1))).double()
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("the logits are not finite; train again with a lower learning rate")
        yield logits.unflatten(0, views.shape[:2]), targets


@dataclass(frozen=True, slots=True)
class _TtaDataset(ImagesDataset):
    """Preprocessed images in several views: (V, crop, crop, 3) uint8."""

    preprocess: Preprocess
    mode: TtaMode

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]:
        image, target = self.images[index]
        return tta_views(lambda rules: preprocess_image(image, rules), self.preprocess, self.mode), target
