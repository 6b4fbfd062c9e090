"""Run the few-shot procedure in a run folder; the only checkpoints are those of the finished run."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split
from sopdeploy.data.image_files import ImageFiles, unreadable_images_error
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.decision_fit import fit_decision, missing_threshold
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import fit_presence
from sopdeploy.evaluation.prediction import HeldOutMetrics, held_out_metrics, predict_logits
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.few_shot.classifier import Array, Targets
from sopdeploy.training.few_shot.config import FewShotConfig
from sopdeploy.training.few_shot.estimates import estimate
from sopdeploy.training.few_shot.procedure import fit_few_shot
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Position, Run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import StopRequested, TrainingStoppedError, handle_signals


def select_split(recipe: Recipe, data: Split) -> tuple[Split, bool]:
    """Return the images to train on, and whether the few-shot procedure applies to them.

    It applies to at most `max_images` images, and not to networks with training-only parts other than the
    branches of DSoP. It also trains on images that were split off the training images, because
    cross-validation on all images is more precise, but not on a held-out folder of the user.
    """
    config: FewShotConfig | None = recipe.few_shot
    if config is None or len(data.train) > config.max_images:
        return data, False
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:  # the procedure has no head for this network
        return data, False
    train, held_out = data.train, data.held_out
    if not (data.divided and isinstance(train, ImageFiles) and isinstance(held_out, ImageFiles)):
        return data, True
    paths = np.concatenate([train.paths, held_out.paths])
    order = np.argsort(paths, kind="stable")
    targets = np.concatenate([train.targets, held_out.targets])
    joined = replace(train, paths=paths[order], targets=targets[order])
    no_images = joined.select(np.zeros(len(joined), np.bool_))
    return replace(data, train=joined, held_out=no_images), True


def train_few_shot(run: Run, data: Split, folder: RunFolder, callback: Callback) -> Decision | None:
    """Run the procedure on the training images of *data* and write `best.pt`, `last.pt` and the history.

    A finished run is not trained again. The thresholds in `best.pt` are fitted to the out-of-fold
    predictions and returned. Held-out images, if there are any, are used only for the score. Raises
    `ConfigError` for several processes, an average or a teacher, `TrainingStoppedError` after a stop signal,
    `DataError` for images that cannot be used.
    """
    if run.strategy.world > 1 or run.ema is not None or run.teacher is not None:
        raise ConfigError(
            "few_shot: needs one process; start it without torchrun, and remove the tables ema and teacher"
        )
    if run.position.history:
        run.decision = _fit_decision(run, data.train)  # with another `rejection.accepts`
        run.strategy.save(folder.best, run.checkpoint(resumable=False))
        return run.decision
    since = time.monotonic()
    with handle_signals(run.strategy) as signals:

        def on_part(name: str, done: int, total: int) -> None:
            callback.on_stage(name=name, done=done, total=total)
            signals.check()

        try:
            targets, logits = fit_few_shot(run, data.train, on_part)
            metrics = _evaluate(run, data, logits)
        except StopRequested:
            raise TrainingStoppedError(
                "stopped before the first checkpoint; start the same command again", signals.signal_number
            ) from None
        except DataError as error:
            raise unreadable_images_error(error, data.train, data.held_out) from None
    run.decision = _fit_decision(run, data.train)
    seconds, lr = time.monotonic() - since, run.optimizer.param_groups[0]["lr"]
    losses = {"loss": targets.mean_loss(logits)}
    row = EpochRow(epoch=1, lr=lr, losses=losses, metrics=metrics, seconds=seconds)
    run.position = Position(epoch=1, seconds=seconds, history=(row,))
    folder.save_last(run)
    folder.save_derived_files(run)
    callback.on_epoch_end(row)
    return run.decision


def _evaluate(run: Run, data: Split, logits: Array) -> HeldOutMetrics:
    """Compute the metrics on the held-out images or, without such images, of the out-of-fold *logits*.

    With held-out images, their score replaces the cross-validated score in `run.few_shot`.
    """
    recipe, images = run.recipe, data.held_out
    if not len(images):
        return held_out_metrics(run.labels, logits, data.train.targets)
    dataset = PreprocessedDataset(images, recipe.preprocess)
    sizes: dict[str, Any] = {"batch_size": recipe.batch_size, "workers": recipe.workers}
    logits, targets = predict_logits(run.model.eval(), dataset, recipe.preprocess, **sizes)
    score = estimate(Targets.of(images, recipe.few_shot.balance_above), logits, recipe.seed)
    name = "top1" if isinstance(score, Rate) else "map"
    run.few_shot = run.few_shot.model_copy(update={name: score, "estimated_on": "held-out"})
    return held_out_metrics(run.labels, logits, targets)


def _fit_decision(run: Run, images: LabeledImages) -> Decision | None:
    """Fit the decision to the out-of-fold logits of *images*, and record why it has no threshold."""
    if run.out_of_fold is None:
        return None
    logits = run.out_of_fold.double().numpy()
    if run.activation == "sigmoid":
        return fit_presence(images.targets.astype(np.float64), sigmoid(logits))
    reason = missing_threshold(len(logits), logits.shape[1], run.recipe.rejection.accepts)
    run.few_shot = run.few_shot.model_copy(update={"unknown": reason})
    decision = fit_decision(
        logits,
        images.targets.astype(np.int64),
        estimated_on="cross-validation",
        accepts=run.recipe.rejection.accepts,
        scalable=False,  # heads that saw fewer images are less certain than the final one
        refitted=run.few_shot.auroc,
    )
    return None if decision == Decision() else decision
