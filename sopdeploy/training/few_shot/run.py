"""Run the few-shot procedure in a run folder: progress, stop signals, checkpoints and history.

The run has one row in its history. Until the procedure is finished there is no checkpoint; a stopped run
starts again and finds the features in the folder.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from sopdeploy.data.base import PreprocessedDataset, Split
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.decision import Decision
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.prediction import EvalMetrics, HeldOutMetrics, evaluate
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.few_shot.config import FEATURES_FILE
from sopdeploy.training.few_shot.procedure import Outcome, fit_few_shot
from sopdeploy.training.run import Position, Run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import StopRequested, TrainingStoppedError, handle_signals


def train_few_shot(run: Run, data: Split, folder: RunFolder, callback: Callback) -> Decision | None:
    """Run the procedure on the training images of *data* and write `best.pt`, `last.pt` and the history.

    A finished run is not trained again. The decision in `best.pt` is fitted to the predictions out of fold
    and returned. Held-out images, if there are any, give the accuracy, and nothing else depends on them.
    Raises `TrainingStoppedError` after Ctrl-C or SIGTERM, `DataError` for images that cannot be used.
    """
    if not run.position.history:
        since = time.monotonic()
        outcome, figures = _fit(run, data, folder, callback)
        run.few_shot, run.out_of_fold = outcome.result, torch.from_numpy(outcome.logits)
        if len(data.held_out):
            rate = Rate.of(round(figures.score * figures.count), figures.count)
            run.few_shot = outcome.result.model_copy(update={"top1": rate, "estimated_on": "held-out"})
        seconds = time.monotonic() - since
        losses, lr = {"loss": outcome.loss}, run.optimizer.param_groups[0]["lr"]
        row = EpochRow(epoch=1, lr=lr, losses=losses, figures=figures, seconds=seconds)
        run.position = Position(epoch=1, seconds=seconds, history=(row,))
        folder.save_last(run)
        folder.save_derived_files(run)
        callback.on_epoch_end(row)
    if run.out_of_fold is None:
        return None
    logits, targets = run.out_of_fold.double().numpy(), data.train.targets.astype(np.int64)
    decision = run.fit_decision(logits, targets, "cross-validation")
    if decision is not None:
        run.strategy.save(folder.best, replace(run.checkpoint(resumable=False), decision=decision))
    return decision


def _fit(run: Run, data: Split, folder: RunFolder, callback: Callback) -> tuple[Outcome, HeldOutMetrics]:
    """Run the procedure, put its network into *run* and evaluate it."""
    with handle_signals(run.strategy) as signals:

        def on_part(name: str, done: int, total: int) -> None:
            callback.on_stage(name=name, done=done, total=total)
            signals.check()

        try:
            outcome = fit_few_shot(run.recipe, run.model, data.train, folder.path, on_part)
            run.replace_model(outcome.model, outcome.config)
            return outcome, _figures(run, data, outcome)
        except StopRequested:
            raise TrainingStoppedError(
                f"stopped before the first checkpoint; start the same command again, it reads the features "
                f"from {folder.path / FEATURES_FILE}",
                signals.signal_number,
            ) from None
        except DataError as error:
            raise unreadable_images_error(error, data.train, data.held_out) from None


def _figures(run: Run, data: Split, outcome: Outcome) -> HeldOutMetrics:
    """Evaluate the network on the held-out images, or summarize the logits out of fold."""
    if len(data.held_out):
        return evaluate(
            run.model,
            PreprocessedDataset(data.held_out, run.recipe.preprocess),
            run.recipe.preprocess,
            batch_size=run.recipe.batch_size,
            workers=run.recipe.workers,
        )
    logits, targets = torch.from_numpy(outcome.logits), outcome.targets.argmax(axis=1)
    labels = torch.from_numpy(targets)
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return EvalMetrics(
        top1=outcome.result.top1.share,
        top5=float((top5 == labels[:, None]).any(dim=1).double().mean()),
        count=len(labels),
        loss=outcome.loss,
    )
