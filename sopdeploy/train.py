"""Training: from a recipe to `best.pt`, read from top to bottom.

A run stopped anywhere (Ctrl-C, SIGTERM, a kill between two epochs) and resumed on the same machine ends
with the weights of an undisturbed one, bit for bit on a CPU with the same number of threads.
"""

import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sopdeploy.data.augment import Augmented
from sopdeploy.data.base import Pictures, Prepared
from sopdeploy.data.batches import Batch, load_batches, shuffled_batches
from sopdeploy.data.sources import open_data
from sopdeploy.errors import TrainingError
from sopdeploy.evaluate import evaluate
from sopdeploy.frozen import Frozen
from sopdeploy.losses import Loss, first_not_finite, training_loss
from sopdeploy.recipe import Recipe
from sopdeploy.seeds import seed_of
from sopdeploy.training.history import best_row
from sopdeploy.training.progress import Progress, Quiet
from sopdeploy.training.run import Run, gradients, resume_run, start_run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.stop import Stop, StopRequested, TrainingStoppedError, watch_for_stop


class TrainingResult(Frozen):
    """What a finished run gave; shares are of the held-out pictures, `seconds` those of all its parts."""

    out: Path
    best: Path
    last: Path
    history: Path
    model: str
    classes: int
    train_count: int
    held_out_count: int
    epochs: int
    best_epoch: int
    best_top1: float
    best_top5: float
    last_top1: float
    seconds: float


def train(
    recipe: Recipe, out_dir: Path, *, resume: bool = False, progress: Progress | None = None
) -> TrainingResult:
    """Run *recipe* to its end and keep it in *out_dir*; with *resume*, go on where `last.pt` there ends.

    Raises `ConfigError` for a folder or recipe that does not fit, `DataError` for data that cannot be
    used, `TrainingError` where a number is no longer finite, `TrainingStoppedError` after a Ctrl-C or
    SIGTERM, when everything is saved.
    """
    onlooker = progress or Quiet()
    folder = RunFolder(out_dir)
    if not resume:
        folder.must_be_free()
    checkpoint = folder.read_last() if resume else None
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = open_data(recipe.data)
    if checkpoint is None:
        run = start_run(recipe, data.train)
    else:
        run = resume_run(recipe, data.train, checkpoint, folder.last)
    onlooker.started(
        epochs=recipe.epochs,
        first_epoch=run.at.epoch,
        train_count=len(data.train),
        held_out_count=len(data.held_out),
    )
    held_out = Prepared(data.held_out, recipe.preprocess)
    with watch_for_stop() as stop:
        try:
            while run.at.epoch < recipe.epochs:
                stop.check()
                train_epoch(run, data.train, stop, onlooker)
                measure_epoch(run, held_out, stop, onlooker)
                folder.save_epoch(run)
                onlooker.finished_epoch(run.at.history[-1])
        except StopRequested:
            folder.save_stopped(run)
            raise TrainingStoppedError(
                f"stopped in epoch {run.at.epoch + 1} of {recipe.epochs} after {run.at.step} steps of it; "
                f"{folder.last} is saved, go on with --resume",
                stop.signal_number,
            ) from None
    return summarise(run, folder, len(data.held_out))


def train_epoch(run: Run, pictures: Pictures, stop: Stop, onlooker: Progress) -> None:
    """Do the steps of the epoch under way that are still to be done."""
    recipe, epoch = run.recipe, run.at.epoch
    batches = shuffled_batches(run.train_count, recipe.batch_size, recipe.seed, epoch)
    view = Augmented(pictures, recipe.augment, recipe.preprocess, recipe.seed, epoch)
    run.model.train()
    since = time.monotonic()
    for batch in load_batches(view, batches[run.at.step :], recipe.workers, run.device):
        loss = train_step(run, batch, len(batches))
        now = time.monotonic()
        run.after_step(loss, len(batch[1]), now - since)
        since = now
        onlooker.stepped(epoch=epoch, step=run.at.step - 1, steps=len(batches), loss=float(loss.total))
        stop.check()


def train_step(run: Run, batch: Batch, steps: int) -> Loss:
    """Do one step on *batch*; raises `TrainingError` before it changes a weight by what is not finite."""
    recipe, at = run.recipe, run.at
    images, labels = batch
    torch.manual_seed(seed_of(recipe.seed, "step", at.epoch, at.step))
    factor = recipe.schedule.factor(at.epoch + at.step / steps, recipe.epochs)
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * factor
    output = run.model(run.normalise(images))
    loss = training_loss(output, labels, run.model.loss_weights(), recipe.loss.label_smoothing)
    stop_unless_finite(first_not_finite(loss), run)
    run.optimizer.zero_grad()
    loss.total.backward()  # type: ignore[no-untyped-call]
    norm = get_total_norm(gradients(run.model))
    stop_unless_finite(None if bool(torch.isfinite(norm)) else "gradient", run)
    if recipe.optimizer.clip_norm:
        clip_grads_with_norm_(run.model.parameters(), recipe.optimizer.clip_norm, norm)
    run.optimizer.step()
    return Loss(loss.total.detach(), loss.parts)


def stop_unless_finite(culprit: str | None, run: Run) -> None:
    """Raise `TrainingError` for the part of the loss that is not finite."""
    if culprit is not None:
        raise TrainingError(
            f"epoch {run.at.epoch + 1}, step {run.at.step + 1}: {culprit} is not finite; "
            "lower optimizer.lr or set optimizer.clip_norm"
        )


def measure_epoch(run: Run, held_out: Prepared, stop: Stop, onlooker: Progress) -> None:
    """Measure the network on the held-out pictures and close the epoch."""
    since, epoch = time.monotonic(), run.at.epoch

    def on_batch(done: int) -> None:
        onlooker.measured(epoch=epoch, done=done)
        stop.check()

    figures = evaluate(
        run.model,
        held_out,
        run.recipe.preprocess,
        batch_size=run.recipe.batch_size,
        workers=run.recipe.workers,
        on_batch=on_batch,
    )
    run.after_epoch(figures, time.monotonic() - since)


def summarise(run: Run, folder: RunFolder, held_out_count: int) -> TrainingResult:
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
        held_out_count=held_out_count,
        epochs=run.at.epoch,
        best_epoch=best.epoch,
        best_top1=best.figures.top1,
        best_top5=best.figures.top5,
        last_top1=history[-1].figures.top1,
        seconds=run.at.seconds,
    )
