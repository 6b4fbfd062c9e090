"""Per-epoch records: held-out metrics, and diagnostics for the report.

Diagnostics never influence training: they use eval mode, fixed held-out images, and no random
numbers.

The field names of the classes here are keys in checkpoints and columns of `history.csv`.

Letters: N images, C classes.
"""

import csv
import io
from collections.abc import Sequence
from statistics import median_high

import numpy as np

from sopdeploy.base.config import StrictModel
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.evaluation.prediction import (
    AllHeads,
    HeldOutMetrics,
    as_evaluated,
    held_out_metrics,
    predict_logits,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier

MAX_IMAGES = 512
# in the order of the columns; each network has some of them
HELD_OUT_METRICS = (
    "loss",
    "top1",
    "top5",
    "map",
    "macro_f1",
    "micro_f1",
)


class Diagnostics(StrictModel):
    """Diagnostics on `num_images` images; without heads if no image shows a class.

    `right` has a character per image: 1 if the main head's top class is right, else 0; empty if
    multi-label.
    """

    num_images: int
    right: str = ""
    heads: dict[str, HeldOutMetrics]


class EpochRow(StrictModel):
    """The record of one epoch; `epoch` counts from 1.

    `losses` are means over the training images. `metrics` and `diagnostics` are those of the
    exported weights. `gradient` is the mean gradient norm before clipping. `component_counts`
    counts, for a gated network, the training images that each component received, with the
    gate's noise. `seconds` is the time of the whole run until the end of the epoch.
    """

    epoch: int
    lr: float
    losses: dict[str, float]
    metrics: HeldOutMetrics
    gradient: float | None = None
    component_counts: tuple[int, ...] = ()
    images_per_second: float | None = None
    diagnostics: Diagnostics | None = None
    seconds: float


def best_epoch(history: Sequence[EpochRow], *, frozen_backbone: bool = False) -> EpochRow:
    """Return the first epoch with the highest top-1 accuracy, or the highest mAP for a multi-label network.

    With *frozen_backbone*, only branches learn and the exported network is the same in every
    epoch. The best epoch is then the last one with the highest sum of the scores of the
    branches.
    """
    if not frozen_backbone:
        # Of equal ones, the first.
        return max(history, key=lambda row: (row.metrics.score, -row.epoch))

    def score_of_branches(row: EpochRow) -> float:
        heads = row.diagnostics.heads if row.diagnostics is not None else {}
        return sum(head.score for name, head in heads.items() if name != "main")

    # Of equal ones, the last.
    return max(history, key=lambda row: (score_of_branches(row), row.epoch))


def median_throughput(history: Sequence[EpochRow]) -> float:
    """Return the (upper) median of the images per second of all epochs; 0 if none was measured."""
    speeds = [row.images_per_second for row in history if row.images_per_second]
    return median_high(speeds) if speeds else 0.0


def history_table(history: Sequence[EpochRow]) -> tuple[list[str], list[dict[str, float]]]:
    """Return the columns of *history*, and its rows: the numbers of an epoch by name, without counts."""
    rows = []
    for epoch in history:
        row: dict[str, float] = {"epoch": epoch.epoch, "lr": epoch.lr}
        row |= {f"train_{name}": loss for name, loss in epoch.losses.items()}
        row |= _metrics_by_name(epoch.metrics, "")
        if epoch.gradient is not None:
            row["gradient"] = epoch.gradient
        if epoch.images_per_second is not None:
            row["images_per_second"] = epoch.images_per_second
        if epoch.diagnostics is not None:
            for name, head in epoch.diagnostics.heads.items():
                row |= _metrics_by_name(head, f"{name}_")
        rows.append({**row, "seconds": round(epoch.seconds, 3)})

    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _metrics_by_name(metrics: HeldOutMetrics, prefix: str) -> dict[str, float]:
    return {
        prefix + name: getattr(metrics, name)
        for name in HELD_OUT_METRICS
        if hasattr(metrics, name)
    }


def history_curve(history: Sequence[EpochRow], column: str) -> list[tuple[float, float]]:
    """Return the points (epoch, value) of a column of *history*; epochs without it are left out."""
    _, rows = history_table(history)
    return [(row["epoch"], row[column]) for row in rows if column in row]


def history_csv(history: Sequence[EpochRow]) -> str:
    """Format *history* as CSV with one line per epoch and one column per metric."""
    columns, rows = history_table(history)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def diagnose(
    model: Classifier,
    held_out: PreprocessedDataset,
    preprocess: Preprocess,
    batch_size: int,
    *,
    mirror: bool = False,
) -> Diagnostics:
    """Compute the diagnostics of *model* on at most `MAX_IMAGES` of *held_out*, in every epoch the same.

    With *mirror*, the logits are means over an image and its mirror image.
    """
    count = min(MAX_IMAGES, len(held_out))
    is_chosen_N = np.zeros(len(held_out), np.bool_)
    is_chosen_N[np.arange(count) * len(held_out) // count] = True  # evenly spaced
    subset = held_out.select(is_chosen_N)

    # One pass through the backbone gives the logits of all heads, the branches included.
    network = AllHeads(model)
    joined, targets = predict_logits(
        as_evaluated(network, mirror=mirror), subset, preprocess, batch_size=batch_size
    )
    logits = network.split(joined)  # by head

    labels = held_out.images.labels
    # If none of these images shows a class, they have no metric, though all held-out images may.
    if targets.ndim == 2 and not targets.any():
        logits = {}
    right = ""  # a character per image, if each has one class
    if targets.ndim == 1:
        are_right = logits["main"].argmax(axis=1) == targets
        right = "".join("1" if is_right else "0" for is_right in are_right)

    return Diagnostics(
        num_images=count,
        right=right,
        heads={
            name: held_out_metrics(labels, logits_NC, targets)
            for name, logits_NC in logits.items()
        },
    )
