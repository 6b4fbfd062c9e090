"""What each epoch gave, and the best of them: one row per epoch, in the checkpoint and in `history.csv`."""

import csv
import io
from collections.abc import Sequence

from sopdeploy.evaluate import Figures
from sopdeploy.frozen import Frozen


class EpochRow(Frozen):
    """`epoch` counts from 1; `losses` are the means of the heads and penalties over the training pictures."""

    epoch: int
    lr: float
    losses: dict[str, float]
    figures: Figures
    seconds: float


def best_row(history: Sequence[EpochRow]) -> EpochRow:
    """Return the row with the highest top-1, the earliest of equal ones."""
    return max(history, key=lambda row: (row.figures.top1, -row.epoch))


def history_csv(history: Sequence[EpochRow]) -> str:
    """Return *history* as a table: one line per epoch, one column per figure and per part of the loss."""
    text = io.StringIO()
    columns = [
        "epoch",
        "lr",
        *(f"train_{name}" for name in history[0].losses),
        "loss",
        "top1",
        "top5",
        "seconds",
    ]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in history:
        figures = row.figures
        losses = row.losses.values()
        writer.writerow(
            [row.epoch, row.lr, *losses, figures.loss, figures.top1, figures.top5, round(row.seconds, 3)]
        )
    return text.getvalue()
