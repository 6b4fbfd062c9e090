"""Evaluation of networks: metrics during training, and per-image scores of a checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.config import Fraction, StrictModel
from sopdeploy.data.base import Dataset, ImagesDataset, LabeledImages
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.metrics import NO_IMAGES, Score
from sopdeploy.images.preprocess import Preprocess, TtaMode, check_tta_mode, tta_views
from sopdeploy.layers.normalize import Normalize

SCORE_BATCH = 32  # images, each with up to ten views


class ProcessGroup:
    """Processes that compute together; the base class is one process.

    `rank` counts from 0 to `world` - 1.
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

    top1: Fraction
    top5: Fraction
    count: int
    loss: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int = 0,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> EvalMetrics:
    """Evaluate the main head of *model* on *dataset*, on the device of the model.

    Each of *processes* evaluates a different part of the images; all return the metrics of the whole.
    *on_batch* receives the number of images done after every batch, equally often in each process. The model
    is in eval mode meanwhile. Raises `DataError` if there are no images, `TrainingError` if the loss is not
    finite.
    """
    device = next(model.parameters()).device
    normalize = Normalize(preprocess).to(device)
    own = range(processes.rank, len(dataset), processes.world)
    batches = [[own[index] for index in batch] for batch in sequential_batches(len(own), batch_size)]
    step = batch_size * processes.world
    was_training = model.training
    model.eval()
    counts, loss = torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    try:
        loaded = load_batches(dataset, batches, workers, device)
        for number in range(-(-len(dataset) // step)):
            batch = next(loaded, None)  # in the last round only some processes may have a batch
            if batch is not None:
                logits, labels = model(normalize(batch[0])).double(), batch[1]
                top = (logits.topk(min(k, logits.shape[1]), dim=1).indices for k in (1, 5))
                correct = [int((predictions == labels[:, None]).sum()) for predictions in top]
                counts += torch.tensor([*correct, len(labels)])
                loss += cross_entropy(logits, labels, reduction="sum").cpu()
            on_batch(min(len(dataset), (number + 1) * step))
    finally:
        model.train(was_training)
    top1, top5, count = processes.all_reduce(counts).tolist()
    total_loss = float(processes.all_reduce(loss))
    if count == 0:
        raise DataError(NO_IMAGES)
    if not math.isfinite(total_loss):
        raise TrainingError(
            "the loss on the held-out images is not finite, training has diverged; lower the learning rate"
        )
    return EvalMetrics(top1=top1 / count, top5=top5 / count, count=count, loss=total_loss / count)


def score_checkpoint(
    path: Path,
    data: Path,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None],
) -> tuple[tuple[str, ...], list[Score]]:
    """Score the checkpoint at *path* on the images below *data*, one subfolder per class.

    Returns the sorted class names and the scores. *on_image* receives the numbers of images done and in
    total.
    """
    checkpoint = read_checkpoint(path)
    model = build_classifier(checkpoint, path).to("cuda" if torch.cuda.is_available() else "cpu")
    images = open_classes(data.expanduser(), tuple(sorted(checkpoint.labels)))
    labels, rules = checkpoint.labels, checkpoint.preprocess
    try:
        scores = score_images(model, labels, images, rules, tta=tta, workers=workers, on_image=on_image)
    except DataError as error:
        raise unreadable_images_error(error, images) from None
    return images.labels, scores


@torch.no_grad()
def score_images(
    model: nn.Module,
    labels: Sequence[str],
    images: LabeledImages,
    preprocess: Preprocess,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Score]:
    """Score *model*, whose outputs are *labels*, on *images*; classes are matched by name.

    Probabilities are averaged over the views of *tta*. The model must be in eval mode and is not moved.
    """
    mode = check_tta_mode(tta, preprocess)
    device = next(model.parameters()).device
    normalize = Normalize(preprocess).to(device)
    columns = [images.labels.index(label) for label in labels]
    dataset = _TtaDataset(images, preprocess, mode)
    scores: list[Score] = []
    for views, targets in load_batches(
        dataset, sequential_batches(len(dataset), SCORE_BATCH), workers, device
    ):
        logits = model(normalize(views.flatten(end_dim=1))).double()
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("the logits are not finite; train again with a lower learning rate")
        probabilities = logits.softmax(dim=1).unflatten(0, views.shape[:2]).mean(dim=1)
        ranking = logits if views.shape[1] == 1 else probabilities  # logits differ where probabilities are 0
        order = ranking.argsort(dim=1, descending=True, stable=True).tolist()
        for target, ranked, row in zip(targets.tolist(), order, probabilities.tolist(), strict=True):
            scores.append(Score.from_ranking(target, [(columns[column], row[column]) for column in ranked]))
        on_image(len(scores), len(dataset))
    return scores


@dataclass(frozen=True, slots=True)
class _TtaDataset(ImagesDataset):
    """Preprocessed images in several views: (V, crop, crop, 3) uint8."""

    preprocess: Preprocess
    mode: TtaMode

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        image, target = self.images[index]
        return tta_views(lambda rules: rules(image), self.preprocess, self.mode), target
