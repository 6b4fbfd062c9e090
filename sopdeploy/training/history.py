"""What each epoch gave, and the best of them: one row per epoch, in the checkpoint and in `history.csv`."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from sopdeploy.config import Fraction, StrictModel
from sopdeploy.evaluation.prediction import EvalMetrics
from sopdeploy.training.diagnostics import Sight

FIGURES = ("loss", "top1", "top5")


class Speed(StrictModel):
    """Pictures learnt from in a second of training, and the share of that time spent waiting for them."""

    pictures_per_second: float
    waiting: Fraction


class EpochRow(StrictModel):
    """`epoch` counts from 1; `losses` are the means of the heads and penalties over the training pictures.

    `figures` are those of the weights that a checkpoint carries for use; where weights are averaged, those
    of both stand in `raw` and `average`. `gradient` is the mean norm of the gradient before it is clipped, a
    step that float16 skips counts as 0; `sight` is of the raw weights.
    """

    epoch: int
    lr: float
    losses: dict[str, float]
    figures: EvalMetrics
    gradient: float | None = None
    speed: Speed | None = None
    sight: Sight | None = None
    raw: EvalMetrics | None = None
    average: EvalMetrics | None = None
    seconds: float


def best_row(history: Sequence[EpochRow]) -> EpochRow:
    """Return the row with the highest top-1, the earliest of equal ones."""
    return max(history, key=lambda row: (row.figures.top1, -row.epoch))


def table_row(row: EpochRow) -> dict[str, float]:
    """Return every single figure of *row* by name, in the order of the columns of `history.csv`."""
    found: dict[str, float] = {"epoch": row.epoch, "lr": row.lr}
    found |= {f"train_{name}": loss for name, loss in row.losses.items()}
    for prefix, figures in {"": row.figures, "raw_": row.raw, "average_": row.average}.items():
        if figures is not None:
            found |= {prefix + name: getattr(figures, name) for name in FIGURES}
    if row.gradient is not None:
        found["gradient"] = row.gradient
    if row.speed is not None:
        found |= row.speed.model_dump()
    if row.sight is not None:
        for name, head in row.sight.heads.items():
            found |= {f"{name}_top1": head.top1, f"{name}_loss": head.loss}
        found |= {f"{name}_imbalance": gate.imbalance for name, gate in row.sight.gates.items()}
    return {**found, "seconds": round(row.seconds, 3)}


def columns(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return every name in *rows*, in the order in which they first stand there."""
    return list(dict.fromkeys(name for row in rows for name in row))


def history_csv(history: Sequence[EpochRow]) -> str:
    """Return *history* as a table: one line per epoch, one column per figure.

    A head that was taken off on the way leaves its cells empty.
    """
    rows = [table_row(row) for row in history]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
