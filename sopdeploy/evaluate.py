"""How good a network is on pictures it has not learnt from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.base import Dataset, Prepared
from sopdeploy.data.batches import batches_in_order, load_batches
from sopdeploy.data.folder import open_classes
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.frozen import Frozen
from sopdeploy.normalise import Normalise
from sopdeploy.preprocess import Preprocess
from sopdeploy.processes import OneProcess, Processes

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class Figures(Frozen):
    """Shares of `count` pictures whose class is the first or among the first five answers; mean loss.

    With fewer than five classes, `top5` counts the pictures whose class is among all answers.
    """

    top1: Share
    top5: Share
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
    processes: Processes = OneProcess(),  # noqa: B008  # has no state
    on_batch: Callable[[int], None] = lambda _done: None,
) -> Figures:
    """Return the figures of the main head of *model* on *dataset*, computed where the model is.

    Every one of *processes* measures its part of the pictures, none twice, and all return the figures of
    the whole. *on_batch* is told the number of pictures done after every batch, in each process equally
    often. The model is in eval mode meanwhile and gets its mode back.
    """
    device = next(model.parameters()).device
    normalise = Normalise(preprocess).to(device)
    mine = list(range(processes.rank, len(dataset), processes.world))
    batches = [[mine[place] for place in batch] for batch in batches_in_order(len(mine), batch_size)]
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


def figures(top1: int, top5: int, done: int, loss: float) -> Figures:
    """Return the shares; raises `DataError` for no pictures, `TrainingError` for weights that diverged."""
    if done == 0:
        raise DataError("there are no pictures to measure on; give a folder with images")
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss on the held-out pictures is not finite, the weights have diverged; "
            "lower the learning rate"
        )
    return Figures(top1=top1 / done, top5=top5 / done, count=done, loss=loss / done)


def evaluate_checkpoint(checkpoint: Path, data: Path, *, workers: int = 0) -> Figures:
    """Return the figures of the network in the file *checkpoint* on the images of a folder.

    *data* holds one subfolder per class of the checkpoint, matched by name, in any order.
    """
    stored = read_checkpoint(checkpoint)
    model = build_classifier(stored, checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pictures = open_classes(data.expanduser(), stored.labels)
    return evaluate(model, Prepared(pictures, stored.preprocess), stored.preprocess, workers=workers)


def hits(logits: Tensor, labels: Tensor, k: int) -> int:
    """Return how many of *labels* are among the first *k* answers."""
    answers = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return int((answers == labels[:, None]).sum())
