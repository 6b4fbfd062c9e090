"""What a finished run tells whoever started it."""

from pathlib import Path

from sopdeploy.data.base import Split
from sopdeploy.frozen import Frozen
from sopdeploy.training.history import best_row
from sopdeploy.training.run import Run
from sopdeploy.training.run_folder import RunFolder


class TrainingResult(Frozen):
    """What a finished run gave; shares are of the held-out pictures, `seconds` those of all its parts.

    `skipped` names the pictures that were left out because they cannot be read.
    """

    out: Path
    best: Path
    last: Path
    history: Path
    model: str
    classes: int
    train_count: int
    held_out_count: int
    skipped: tuple[str, ...]
    epochs: int
    best_epoch: int
    best_top1: float
    best_top5: float
    last_top1: float
    seconds: float


def summarise(run: Run, folder: RunFolder, data: Split) -> TrainingResult:
    """Return what the run gave."""
    history = run.at.history
    best = best_row(history)
    return TrainingResult(
        out=folder.path,
        best=folder.best,
        last=folder.last,
        history=folder.history,
        model=run.recipe.model.name,
        classes=len(run.labels),
        train_count=run.train_count,
        held_out_count=len(data.held_out),
        skipped=data.skipped,
        epochs=run.at.epoch,
        best_epoch=best.epoch,
        best_top1=best.figures.top1,
        best_top5=best.figures.top5,
        last_top1=history[-1].figures.top1,
        seconds=run.at.seconds,
    )
