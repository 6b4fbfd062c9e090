"""What each epoch gave, and the best of them: one row per epoch, in the checkpoint and in `history.csv`."""

import csv
import io
from collections.abc import Sequence

from sopdeploy.evaluate import Figures
from sopdeploy.frozen import Frozen

FIGURES = ("loss", "top1", "top5")


class EpochRow(Frozen):
    """`epoch` counts from 1; `losses` are the means of the heads and penalties over the training pictures.

    `figures` are those of the weights that a checkpoint carries for use; where weights are averaged, those
    of both stand in `raw` and `average`.
    """

    epoch: int
    lr: float
    losses: dict[str, float]
    figures: Figures
    raw: Figures | None = None
    average: Figures | None = None
    seconds: float


def best_row(history: Sequence[EpochRow]) -> EpochRow:
    """Return the row with the highest top-1, the earliest of equal ones."""
    return max(history, key=lambda row: (row.figures.top1, -row.epoch))


def history_csv(history: Sequence[EpochRow]) -> str:
    """Return *history* as a table: one line per epoch, one column per figure and per part of the loss.

    A head that was taken off on the way leaves its cells empty.
    """
    text = io.StringIO()
    heads = list(history[0].losses) if history else []
    sides = ["raw", "average"] if history and history[0].average is not None else []
    writer = csv.writer(text, lineterminator="\n")
    beside = [f"{side}_{figure}" for side in sides for figure in FIGURES]
    writer.writerow(["epoch", "lr", *(f"train_{name}" for name in heads), *FIGURES, *beside, "seconds"])
    for row in history:
        losses = [row.losses.get(name, "") for name in heads]
        shown = [row.figures, *(getattr(row, side) for side in sides)]
        figures = [getattr(one, figure) for one in shown for figure in FIGURES]
        writer.writerow([row.epoch, row.lr, *losses, *figures, round(row.seconds, 3)])
    return text.getvalue()
