"""How good a network is on pictures it has not learnt from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
from sopdeploy.data.validation import unreadable_images_error
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.metrics import NO_IMAGES, Score
from sopdeploy.images.preprocess import Preprocess, TtaMode, check_tta_mode, tta_views
from sopdeploy.layers.normalize import Normalize


class ProcessGroup(Protocol):
    """The processes that share a piece of work; `rank` counts from 0 to `world` - 1."""

    rank: int
    world: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of *values* over the processes."""


class SingleProcessGroup:
    """Nobody to share with."""

    rank = 0
    world = 1

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return *values*."""
        return values


BATCH = 32  # pictures; each may have ten views


class EvalMetrics(StrictModel):
    """Shares of `count` pictures whose class is the first or among the first five answers; mean loss.

    With fewer than five classes, `top5` counts the pictures whose class is among all answers.
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
    processes: ProcessGroup = SingleProcessGroup(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> EvalMetrics:
    """Return the figures of the main head of *model* on *dataset*, computed where the model is.

    Every one of *processes* measures its part of the pictures, none twice, and all return the figures of
    the whole. *on_batch* is told the number of pictures done after every batch, in each process equally
    often. The model is in eval mode meanwhile and gets its mode back.
    """
    device = next(model.parameters()).device
    normalise = Normalize(preprocess).to(device)
    mine = list(range(processes.rank, len(dataset), processes.world))
    batches = [[mine[place] for place in batch] for batch in sequential_batches(len(mine), batch_size)]
    at_once = batch_size * processes.world
    was_training = model.training
    model.eval()
    counts, loss = torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    try:
        loaded = load_batches(dataset, batches, workers, device)
        for number in range(-(-len(dataset) // at_once)):
            batch = next(loaded, None)  # the last round may be of other processes only
            if batch is not None:
                logits, labels = model(normalise(batch[0])).double(), batch[1]
                counts += torch.tensor([hits(logits, labels, 1), hits(logits, labels, 5), len(labels)])
                loss += cross_entropy(logits, labels, reduction="sum").cpu()
            on_batch(min(len(dataset), (number + 1) * at_once))
    finally:
        model.train(was_training)
    top1, top5, done = processes.all_reduce(counts).tolist()
    return figures(top1, top5, done, float(processes.all_reduce(loss)))


def figures(top1: int, top5: int, done: int, loss: float) -> EvalMetrics:
    """Return the shares; raises `DataError` for no pictures, `TrainingError` for weights that diverged."""
    if done == 0:
        raise DataError(NO_IMAGES)
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss on the held-out pictures is not finite, the weights have diverged; "
            "lower the learning rate"
        )
    return EvalMetrics(top1=top1 / done, top5=top5 / done, count=done, loss=loss / done)


def score_checkpoint(
    path: Path,
    data: Path,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None],
) -> tuple[tuple[str, ...], list[Score]]:
    """Return the classes of the checkpoint at *path*, sorted, and its scores on the pictures below *data*.

    *data* holds one subfolder per class, matched by name. *on_image* is told how many of how many are done.
    """
    stored = read_checkpoint(path)
    model = build_classifier(stored, path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pictures = open_classes(data.expanduser(), tuple(sorted(stored.labels)))
    labels = stored.labels
    try:
        return pictures.labels, score_images(
            model, labels, pictures, stored.preprocess, tta=tta, workers=workers, on_image=on_image
        )
    except DataError as problem:
        raise unreadable_images_error(problem, pictures) from None


@torch.no_grad()
def score_images(
    model: nn.Module,
    labels: Sequence[str],
    pictures: LabeledImages,
    preprocess: Preprocess,
    *,
    tta: str = "none",
    workers: int = 0,
    on_image: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Score]:
    """Return the score of each of *pictures* by *model*, whose outputs are *labels*; matched by name.

    Of several views the probabilities are averaged. The model must be in eval mode; it computes where it is.
    """
    wish = check_tta_mode(tta, preprocess)
    device = next(model.parameters()).device
    normalise = Normalize(preprocess).to(device)
    columns = [pictures.labels.index(label) for label in labels]
    seen = Viewed(pictures, preprocess, wish)
    scores: list[Score] = []
    for images, targets in load_batches(seen, sequential_batches(len(seen), BATCH), workers, device):
        logits = model(normalise(images.flatten(end_dim=1))).double()
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError(
                "the network's answers are not finite; train again with a lower learning rate"
            )
        several = logits.softmax(dim=1).unflatten(0, images.shape[:2]).mean(dim=1)
        ranking = logits if images.shape[1] == 1 else several
        order = ranking.argsort(dim=1, descending=True, stable=True).tolist()
        for target, places, row in zip(targets.tolist(), order, several.tolist(), strict=True):
            scores.append(Score.from_ranking(target, [(columns[place], row[place]) for place in places]))
        on_image(len(scores), len(seen))
    return scores


@dataclass(frozen=True, slots=True)
class Viewed(ImagesDataset):
    """Pictures as the service would prepare them, each in several views: (V, crop, crop, 3) uint8."""

    preprocess: Preprocess
    wish: TtaMode

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        picture, label = self.pictures[index]
        return tta_views(lambda rules: rules(picture), self.preprocess, self.wish), label


def hits(logits: Tensor, labels: Tensor, k: int) -> int:
    """Return how many of *labels* are among the first *k* answers."""
    answers = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return int((answers == labels[:, None]).sum())
