"""Run the few-shot procedure in a run folder: progress, stop signals, checkpoints and history.

The run has one row in its history. Until the procedure is finished there is no checkpoint; a stopped run
starts again and reads the cached features from the folder.
"""

import time

import numpy as np
import torch

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.errors import DataError
from sopdeploy.evaluation.decision_fit import fit_decision, missing_threshold
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import fit_presence
from sopdeploy.evaluation.prediction import EvalMetrics, HeldOutMetrics, multi_label_metrics, predict_logits
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.few_shot.classifier import Array, Targets
from sopdeploy.training.few_shot.config import FEATURES_FILE, FewShotConfig
from sopdeploy.training.few_shot.estimates import estimate
from sopdeploy.training.few_shot.procedure import Outcome, fit_few_shot
from sopdeploy.training.run import Position, Run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import StopRequested, TrainingStoppedError, handle_signals


def train_few_shot(run: Run, data: Split, folder: RunFolder, callback: Callback) -> Decision | None:
    """Run the procedure on the training images of *data* and write `best.pt`, `last.pt` and the history.

    A finished run is not trained again. The thresholds in `best.pt` are fitted to the out-of-fold
    predictions and returned. Held-out images, if there are any, are used only for the score.
    Raises `TrainingStoppedError` after Ctrl-C or SIGTERM, `DataError` for images that cannot be used.
    """
    if run.position.history:
        before, run.decision = run.decision, _fit_decision(run, data.train)
        if run.decision != before:  # rejection.accepts may change when a run is resumed
            run.strategy.save(folder.best, run.checkpoint(resumable=False))
        return run.decision
    since = time.monotonic()
    outcome, metrics = _fit(run, data, folder, callback)
    run.out_of_fold = torch.from_numpy(outcome.logits)
    run.decision = _fit_decision(run, data.train)
    seconds = time.monotonic() - since
    losses, lr = {"loss": outcome.loss}, run.optimizer.param_groups[0]["lr"]
    row = EpochRow(epoch=1, lr=lr, losses=losses, metrics=metrics, seconds=seconds)
    run.position = Position(epoch=1, seconds=seconds, history=(row,))
    folder.save_last(run)
    folder.save_derived_files(run)
    callback.on_epoch_end(row)
    return run.decision


def _fit(run: Run, data: Split, folder: RunFolder, callback: Callback) -> tuple[Outcome, HeldOutMetrics]:
    """Run the procedure, store its network and record in *run*, and compute the metrics for the history."""
    with handle_signals(run.strategy) as signals:

        def on_part(name: str, done: int, total: int) -> None:
            callback.on_stage(name=name, done=done, total=total)
            signals.check()

        try:
            outcome = fit_few_shot(run.recipe, run.model, data.train, folder.path, on_part, run.strategy)
            run.recipe = outcome.recipe
            run.normalize = Normalize(outcome.recipe.preprocess).to(run.strategy.device)
            config = outcome.model.config.model_dump(mode="json")
            run.replace_model(outcome.name, outcome.model, config)
            run.few_shot = outcome.result
            return outcome, _evaluate(run, data, outcome)
        except StopRequested:
            raise TrainingStoppedError(
                f"stopped before the first checkpoint; start the same command again, it reads the features "
                f"from {folder.path / FEATURES_FILE}",
                signals.signal_number,
            ) from None
        except DataError as error:
            raise unreadable_images_error(error, data.train, data.held_out) from None


def _evaluate(run: Run, data: Split, outcome: Outcome) -> HeldOutMetrics:
    """Compute the metrics on the held-out images or, if there are none, of the out-of-fold logits.

    With held-out images, their score replaces the cross-validated score in `run.few_shot`.
    """
    if not len(data.held_out):
        return _metrics(run, outcome.targets, outcome.logits)
    recipe = run.recipe
    dataset = PreprocessedDataset(data.held_out, recipe.preprocess)
    run.model.eval()
    logits, _ = predict_logits(
        run.model, dataset, recipe.preprocess, batch_size=recipe.batch_size, workers=recipe.workers
    )
    targets = Targets.of(data.held_out, FewShotConfig().balance_above)
    score = estimate(targets, logits, recipe.seed)
    name = "top1" if isinstance(score, Rate) else "map"
    run.few_shot = outcome.result.model_copy(update={name: score, "estimated_on": "held-out"})
    return _metrics(run, targets, logits)


def _metrics(run: Run, targets: Targets, logits_NC: Array) -> HeldOutMetrics:
    """Compute the metrics of the logits of images with *targets*; all images have equal weights."""
    losses, count = targets.losses(logits_NC) / targets.weights, len(logits_NC)
    if targets.activation == "sigmoid":
        return multi_label_metrics(run.labels, targets.classes, sigmoid(logits_NC), float(losses.mean()))
    labels, order = targets.classes.argmax(axis=1), np.argsort(-logits_NC, axis=1, kind="stable")
    found = order[:, :5] == labels[:, None]
    return EvalMetrics(
        top1=float(found[:, 0].mean()),
        top5=float(found.any(axis=1).mean()),
        count=count,
        loss=float(losses.mean()),
    )


def _fit_decision(run: Run, images: LabeledImages) -> Decision | None:
    """Fit the decision to the out-of-fold logits of *images*.

    No temperature is fitted: C has the smallest cross-validated loss, and a temperature for heads that saw
    fewer images makes the final head, which is more certain, overconfident.
    """
    if run.out_of_fold is None or run.few_shot is None:
        return None
    logits = run.out_of_fold.double().numpy()
    if run.activation == "sigmoid":
        return fit_presence(images.targets.astype(np.float64), sigmoid(logits))
    accepts = run.recipe.rejection.accepts
    reason = missing_threshold(len(logits), logits.shape[1], accepts)
    run.few_shot = run.few_shot.model_copy(update={"unknown": reason})
    decision = fit_decision(
        logits,
        images.targets.astype(np.int64),
        estimated_on="cross-validation",
        accepts=accepts,
        scalable=False,
        refitted=run.few_shot.auroc,
    )
    return None if decision == Decision() else decision
