"""The training loop: from a recipe to `best.pt`.

A run that is stopped or killed at any time and then resumed on the same machine ends with the weights of an
uninterrupted one: bit for bit on a CPU with the same number of threads.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import numpy as np
import torch

from sopdeploy.checkpoint import build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.data.augment import AugmentedDataset, PadCrop, PadCroppedDataset
from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split
from sopdeploy.data.batches import balanced_batches, load_batches, shuffled_batches, with_wait_time
from sopdeploy.data.image_files import describe_contradictions, hash_images, unreadable_images_error
from sopdeploy.data.sources import open_data
from sopdeploy.decision import Decision
from sopdeploy.errors import DataError
from sopdeploy.evaluation.decision_fit import MIN_IMAGES, fit_decision
from sopdeploy.evaluation.prediction import evaluate, predict_logits
from sopdeploy.project import SAMPLED, Origin, folder_name, utc_now
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.diagnostics import best_epoch, diagnose
from sopdeploy.training.distributed.batch_sharding import check_divisible, shard_step
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.distributed.torchrun import check_same_step
from sopdeploy.training.epoch_choice import HeldOutEstimate
from sopdeploy.training.fine_tuning import set_train_mode
from sopdeploy.training.procedure import run_procedure, select_procedure
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.resume import resume_run
from sopdeploy.training.run import Run, create_run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import SignalState, StopRequested, TrainingStoppedError, handle_signals
from sopdeploy.training.start_weights import StartReport
from sopdeploy.training.step.gradient import train_step

MAX_HASHED = 50_000  # training images; hashing more delays the start by more than a minute


class TrainingResult(StrictModel):
    """The files and metrics of a finished run.

    Attributes:
        skipped: Images that could not be read.
        best_top1: Accuracy on the images that select the epoch; `estimate` is the score to expect on new
            images. With several classes per image, mAP and macro F1 are set instead of the accuracies.
        seconds: Time of the run with all its resumptions.
        few_shot: The record of the few-shot procedure, if it applied; it contains its estimate.
        decision: Temperature and rejection threshold in `best`, if there were enough images, or the
            thresholds of a multi-label network.
        start: The report on the start weights; None for random weights.
        training_only: The parts that the export detaches.
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
    best_top1: float | None = None
    best_top5: float | None = None
    last_top1: float | None = None
    best_map: float | None = None
    best_macro_f1: float | None = None
    last_map: float | None = None
    seconds: float
    estimate: HeldOutEstimate | None = None
    few_shot: Any = None
    decision: Decision | None = None
    start: StartReport | None = None
    training_only: tuple[str, ...] = ()


def train(
    recipe: Recipe,
    out_dir: Path,
    *,
    resume: bool | Literal["auto"] = False,
    callback: Callback | None = None,
    strategy: Strategy | None = None,
    given: Sequence[str] = (),
) -> TrainingResult:
    """Train *recipe* and write the run to *out_dir*.

    *resume* continues from `last.pt` in *out_dir*; "auto" does so if there is one. *callback* is used in the
    first process only. *strategy* defaults to the processes that torchrun started. *given* are the recipe
    keys that the user has set; one that has no effect is a `ConfigError`.

    Raises `ConfigError` and `DataError` for invalid input, `TrainingError` if a loss, gradient or buffer is
    not finite, `TrainingStoppedError` after Ctrl-C or SIGTERM.
    """
    strategy = strategy or Strategy(select_device(recipe.device))
    if callback is None or strategy.rank != 0:
        callback = Callback()
    folder = RunFolder(out_dir, strategy)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        continued = folder.last.exists() if resume == "auto" else resume
        run, data, few_shot = start_or_resume(
            recipe, folder, strategy, callback, resume=continued, given=given
        )
        return _train_to_end(run, data, folder, callback, few_shot=few_shot)
    finally:
        folder.unlock()


def _train_to_end(
    run: Run, data: Split, folder: RunFolder, callback: Callback, *, few_shot: bool
) -> TrainingResult:
    """Run the remaining epochs or the few-shot procedure, and fit the decision of `best.pt`."""
    recipe = run.recipe
    if few_shot:
        decision = run_procedure(run, data, folder, callback)
        return _summarize(run, folder, data, decision)
    cropped = isinstance(recipe.augment, PadCrop) and recipe.augment.held_out
    held_out = (PadCroppedDataset if cropped else PreprocessedDataset)(data.held_out, recipe.preprocess)
    with handle_signals(run.strategy) as signals:
        try:
            while run.position.epoch < recipe.epochs:
                signals.check()
                run.remove_branches_if_due()
                train_epoch(run, data.train, folder, signals, callback)
                evaluate_epoch(run, held_out, signals, callback)
                folder.save_last(run)
                folder.save_derived_files(run)
                callback.on_epoch_end(run.position.history[-1])
            decision = fit_best(run, held_out, folder, callback)
        except StopRequested as stop:
            folder.save_last(run)
            raise TrainingStoppedError(
                f"stopped in epoch {run.position.epoch + 1} of {recipe.epochs} after "
                f"{run.position.step} steps of it; {folder.last} is saved and can be resumed",
                stop.signal_number,
            ) from None
        except DataError as error:
            raise unreadable_images_error(error, data.train, data.held_out) from None
    return _summarize(run, folder, data, decision)


def start_or_resume(
    recipe: Recipe,
    folder: RunFolder,
    strategy: Strategy,
    callback: Callback,
    *,
    resume: bool,
    given: Sequence[str] = (),
) -> tuple[Run, Split, bool]:
    """Create the run, or rebuild it from its checkpoint, and open its data.

    Also returns whether the few-shot procedure applies. All checks run before the folder is changed.
    """
    if not resume:
        folder.check_free()
    checkpoint = folder.read_last() if resume else None
    record = None if checkpoint is None else checkpoint.training
    data, few_shot, reason = select_procedure(recipe, open_data(recipe.data, callback.on_warning), record)
    recipe.check_effect(given, few_shot=few_shot)
    check_divisible(recipe, len(data.train), strategy.world)
    if checkpoint is None:
        run = create_run(recipe, data.train, strategy)
        folder.lock()
        if run.start is not None:
            callback.on_start_weights(run.start)
    else:
        run = resume_run(recipe, data.train, strategy, checkpoint, folder.last)
    check_same_step(run, folder.path)
    if strategy.rank == 0 and len(data.train) <= MAX_HASHED:
        hashes = hash_images(data.train)
        run.image_hashes = torch.from_numpy(np.unique(hashes))
        if warning := describe_contradictions(data.train, hashes):
            callback.on_warning(warning)
    before = None if checkpoint is None else checkpoint.origin
    run.origin = Origin(
        run=folder_name(folder.path),
        run_id=token_hex(6) if before is None else before.run_id,
        started=utc_now() if before is None else before.started,
        data=folder_name(getattr(recipe.data, "path", None) or recipe.data.kind),
        images=len(data.train) + len(data.held_out),
        classes=len(run.labels),
        sample=run.image_hashes[:SAMPLED].tolist(),
    )
    if checkpoint is not None:
        folder.save_derived_files(run)
    if reason:
        callback.on_procedure(reason)
    callback.on_train_start(
        epochs=recipe.epochs,
        first_epoch=run.position.epoch,
        train_count=len(data.train),
        held_out_count=len(data.held_out),
        input_side=run.recipe.preprocess.crop,
    )
    return run, data, few_shot


def epoch_data(recipe: Recipe, images: LabeledImages, epoch: int) -> tuple[AugmentedDataset, list[list[int]]]:
    """Return the augmented *images* of *epoch*, and the sample indices of each step."""
    augment, rules = recipe.augment, recipe.preprocess.model_copy(update={"crop": recipe.training_crop})
    dataset = AugmentedDataset(images, augment, rules, recipe.seed, epoch, recipe.rand_augment, recipe.color)
    copies = 2 if isinstance(augment, PadCrop) and augment.doubled else 1
    if recipe.sampler == "balanced":
        targets = np.tile(images.targets.astype(np.int64), copies)
        return dataset, balanced_batches(targets, recipe.batch_size, recipe.seed, epoch)
    return dataset, shuffled_batches(copies * len(images), recipe.batch_size, recipe.seed, epoch)


def train_epoch(
    run: Run, images: LabeledImages, folder: RunFolder, signals: SignalState, callback: Callback
) -> None:
    """Run the remaining steps of the current epoch."""
    recipe, epoch = run.recipe, run.position.epoch
    dataset, batches = epoch_data(recipe, images, epoch)
    set_train_mode(run.model, recipe.start)
    since = time.monotonic()
    shards = [shard_step(samples, recipe, run.strategy).samples for samples in batches[run.position.step :]]
    loader = load_batches(dataset, shards, recipe.workers, run.strategy.device)
    for batch, waited in with_wait_time(loader):
        step = run.position.step
        loss, gradient_norm = train_step(run, batch, batches[step], len(batches))
        now = time.monotonic()
        run.after_step(loss, gradient_norm, len(batches[step]), seconds=now - since, waited=waited)
        since = now
        callback.on_step_end(epoch=epoch, step=step, steps=len(batches), loss=float(loss.total))
        if signals.check(save=folder.is_save_due(recipe.save)):
            folder.save_last(run)


def evaluate_epoch(run: Run, held_out: PreprocessedDataset, signals: SignalState, callback: Callback) -> None:
    """Evaluate the exported weights on held-out images; finish the epoch."""
    since, epoch, recipe = time.monotonic(), run.position.epoch, run.recipe
    run.synchronize_buffers()

    def on_batch(done: int) -> None:
        callback.on_evaluation_batch(epoch=epoch, done=done)
        signals.check()

    metrics = evaluate(
        run.exported,
        held_out,
        recipe.preprocess,
        batch_size=recipe.batch_size // run.strategy.world,
        workers=recipe.workers,
        processes=run.strategy,
        on_batch=on_batch,
    )
    diagnostics = diagnose(run.exported, held_out, run.normalize, recipe.batch_size)
    run.after_epoch(metrics, diagnostics, time.monotonic() - since)


def fit_best(
    run: Run, held_out: PreprocessedDataset, folder: RunFolder, callback: Callback
) -> Decision | None:
    """Fit temperature and rejection threshold to the held-out images; add them and the score to `best.pt`.

    Returns the fitted decision, or `None` if there are too few images or this is not the first process. With
    several classes per image, nothing is fitted and the thresholds in `best.pt` are returned. A resumed run
    repeats the fit with the same images.
    """
    if run.strategy.rank != 0:
        return None
    checkpoint = read_checkpoint(folder.best)
    decision = checkpoint.decision
    if run.activation == "softmax" and len(held_out) >= MIN_IMAGES:
        model = build_classifier(checkpoint, folder.best).to(run.strategy.device)
        logits, targets = predict_logits(
            model,
            held_out,
            run.recipe.preprocess,
            batch_size=run.recipe.batch_size,
            workers=run.recipe.workers,
            on_batch=lambda done: callback.on_evaluation_batch(epoch=run.recipe.epochs - 1, done=done),
        )
        decision = fit_decision(
            logits,
            targets,
            estimated_on="held-out",
            accepts=run.recipe.rejection.accepts,
            scalable=model.logits_layer() is not None,
            groups=getattr(held_out.images, "groups", None),
        )
    record = {**checkpoint.training, "estimate": run.estimate.model_dump(mode="json")}
    write_checkpoint(folder.best, replace(checkpoint, training=record, decision=decision))
    return decision


def _summarize(run: Run, folder: RunFolder, data: Split, decision: Decision | None) -> TrainingResult:
    history = run.position.history
    best = best_epoch(history, frozen_backbone=run.recipe.frozen_backbone)
    names = ("map", "macro_f1") if run.activation == "sigmoid" else ("top1", "top5")
    metrics = {f"best_{name}": getattr(best.metrics, name) for name in names}
    metrics[f"last_{names[0]}"] = getattr(history[-1].metrics, names[0])
    return TrainingResult(
        out=folder.path,
        best=folder.best,
        last=folder.last,
        history=folder.history,
        model=run.name,
        classes=len(run.labels),
        train_count=run.train_count,
        held_out_count=len(data.held_out),
        skipped=data.skipped,
        epochs=run.position.epoch,
        best_epoch=best.epoch,
        seconds=run.position.seconds,
        estimate=run.estimate if run.few_shot is None else None,
        few_shot=run.few_shot,
        start=run.start,
        training_only=run.model.training_only,
        **metrics,
        decision=decision,
    )
