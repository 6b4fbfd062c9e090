"""Training: from a recipe to `best.pt`, read from top to bottom.

A run stopped anywhere (Ctrl-C, SIGTERM, a SIGKILL at any moment) and resumed on the same machine ends with
the weights of an undisturbed one, bit for bit on a CPU with the same number of threads.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sopdeploy.data.augment import AugmentedDataset
from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split
from sopdeploy.data.batches import Batch, balanced_batches, load_batches, shuffled_batches, with_wait_time
from sopdeploy.data.sources import open_data
from sopdeploy.data.validation import unreadable_images_error
from sopdeploy.errors import DataError
from sopdeploy.evaluation.prediction import EvalMetrics, evaluate
from sopdeploy.seeds import derive_seed
from sopdeploy.training.branches import remove_branches_if_due
from sopdeploy.training.callbacks import NullCallback, Progress
from sopdeploy.training.diagnostics import look, spectrum_epochs
from sopdeploy.training.distributed.batch_sharding import Piece, must_divide, slice_of
from sopdeploy.training.distributed.strategy import Parallel
from sopdeploy.training.distributed.torchrun import must_be_at_one_step, processes_of
from sopdeploy.training.fine_tuning import TIMES, into_training
from sopdeploy.training.losses import Loss, first_not_finite, training_loss
from sopdeploy.training.optimizers import AdaHessian
from sopdeploy.training.precision import (
    all_finite,
    first_not_finite_tensor,
    float_buffers,
    gradients,
    not_finite,
)
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.resume import TrainingResult, resume_run, summarise
from sopdeploy.training.run import Run, StepResult, start_run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import Stop, StopRequested, TrainingStoppedError, watch_for_stop


def epoch_batches(recipe: Recipe, pictures: LabeledImages, epoch: int) -> list[list[int]]:
    """Return the samples of each step of *epoch*."""
    if recipe.sampler == "balanced":
        return balanced_batches(pictures.targets, recipe.batch_size, recipe.seed, epoch)
    return shuffled_batches(len(pictures), recipe.batch_size, recipe.seed, epoch)


def epoch_view(recipe: Recipe, pictures: LabeledImages, epoch: int) -> AugmentedDataset:
    """Return *pictures* as the network sees them in *epoch*, augmented."""
    return AugmentedDataset(pictures, recipe.augment, recipe.preprocess, recipe.seed, epoch, recipe.distort)


def train(
    recipe: Recipe,
    out_dir: Path,
    *,
    resume: bool | Literal["auto"] = False,
    progress: Progress | None = None,
    parallel: Parallel | None = None,
) -> TrainingResult:
    """Run *recipe* to its end and keep it in *out_dir*; with *resume*, go on where `last.pt` there ends.

    "auto" goes on if there is something to go on from, else it starts. Raises `ConfigError`, `DataError`,
    `TrainingError` where a number is no longer finite, `TrainingStoppedError` after a Ctrl-C or SIGTERM.
    """
    parallel = parallel or processes_of(recipe)
    onlooker = progress if progress is not None and parallel.rank == 0 else NullCallback()
    folder = RunFolder(out_dir, parallel)
    if resume == "auto":
        resume = folder.holds_run()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    run, data = begin(recipe, folder, parallel, onlooker, resume=resume)
    held_out = PreprocessedDataset(data.held_out, recipe.preprocess)
    with watch_for_stop(parallel) as stop:
        try:
            while run.at.epoch < recipe.epochs:
                stop.check()
                remove_branches_if_due(run)
                train_epoch(run, data.train, folder, stop, onlooker)
                measure_epoch(run, held_out, stop, onlooker)
                folder.save_epoch(run)
                onlooker.finished_epoch(run.at.history[-1])
        except StopRequested:
            folder.save_last(run)
            raise TrainingStoppedError(
                f"stopped in epoch {run.at.epoch + 1} of {recipe.epochs} after {run.at.step} steps of it; "
                f"{folder.last} is saved, go on with --resume",
                stop.signal_number,
            ) from None
        except DataError as problem:
            raise unreadable_images_error(problem, data.train, data.held_out) from None
    return summarise(run, folder, data)


def begin(
    recipe: Recipe, folder: RunFolder, parallel: Parallel, onlooker: Progress, *, resume: bool
) -> tuple[Run, Split]:
    """Return a run at its start, or where it was saved, and its data; the folder is touched last."""
    if not resume:
        folder.must_be_free()
    checkpoint = folder.read_last() if resume else None
    data = open_data(recipe.data, onlooker.warned)
    must_divide(recipe, len(data.train), parallel.world)
    if checkpoint is None:
        run = start_run(recipe, data.train, parallel)
    else:
        run = resume_run(recipe, data.train, parallel, *checkpoint)
    must_be_at_one_step(run, folder.path)
    if checkpoint is not None:
        folder.save_consequences(run)
    if folder.warning is not None:
        onlooker.warned(folder.warning)
    onlooker.started(
        epochs=recipe.epochs,
        first_epoch=run.at.epoch,
        train_count=len(data.train),
        held_out_count=len(data.held_out),
    )
    return run, data


def train_epoch(run: Run, pictures: LabeledImages, folder: RunFolder, stop: Stop, onlooker: Progress) -> None:
    """Do the steps of the epoch under way that are still to be done."""
    recipe, epoch = run.recipe, run.at.epoch
    batches = epoch_batches(recipe, pictures, epoch)
    view = epoch_view(recipe, pictures, epoch)
    into_training(run.model, recipe.start)
    since = time.monotonic()
    shares = [slice_of(samples, recipe, run.parallel).samples for samples in batches[run.at.step :]]
    for batch, waited in with_wait_time(load_batches(view, shares, recipe.workers, run.parallel.device)):
        samples = batches[run.at.step]
        result = train_step(run, batch, samples, len(batches))
        now = time.monotonic()
        run.after_step(result, len(samples), now - since, waited)
        since = now
        onlooker.stepped(epoch=epoch, step=run.at.step - 1, steps=len(batches), loss=float(result.loss.total))
        stop.check(save=folder.is_due(recipe.save, run.at.step))
        if stop.asked_to_save():
            folder.save_last(run)


def train_step(run: Run, batch: Batch, samples: list[int], steps: int) -> StepResult:
    """Do one step on *batch*; raises `TrainingError` before it changes a weight by what is not finite.

    *samples* are those of the whole step, of which *batch* is what this process computes.
    """
    recipe, at = run.recipe, run.at
    torch.manual_seed(derive_seed(recipe.seed, "step", at.epoch, at.step))
    factor = recipe.schedule.factor(at.epoch + at.step / steps, recipe.epochs)
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * factor * group.get(TIMES, 1.0)
    mixed = recipe.mix(run.normalise(batch[0]), batch[1], len(run.labels))
    run.optimizer.zero_grad()
    loss = loss_and_gradient(run, mixed, slice_of(samples, recipe, run.parallel).pieces)
    run.precision.unscale(run.optimizer)
    norm = get_total_norm(gradients(run.model).values())
    finite = stop_unless_finite(run, loss, norm, samples)
    if recipe.optimizer.clip_norm and finite:
        clip_grads_with_norm_(run.model.parameters(), recipe.optimizer.clip_norm, norm)
    if run.precision.step(run.optimizer, finite=finite) and run.average is not None:
        run.average.update(run.model)
    return StepResult(loss, float(norm) if finite else 0.0)


def loss_and_gradient(run: Run, batch: Batch, pieces: Sequence[Piece]) -> Loss:
    """Compute the loss of a step piece by piece, and leave its gradient at the weights.

    Each piece counts by its samples, so that pieces of different sizes add up to the mean of the whole. What
    couples samples does not: batch norm's statistics and a gate's balance loss are those of a piece.
    """
    images, targets = batch
    count = sum(piece.total for piece in pieces)
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        run.parallel.begin(piece.total)
        wanted = targets[piece.first : piece.end]
        with run.precision.autocast():
            output = run.network(part := images[piece.first : piece.end])
            loss = training_loss(output, wanted, run.model.loss_weights(), run.recipe.loss.label_smoothing)
            if run.teacher is not None:
                loss = run.teacher.join(loss, part, output)
        share = len(wanted) / count
        differentiate(run, loss.total * share, last=piece is pieces[-1])
        for name, value in {"total": loss.total.detach(), **loss.parts}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value * share
    summed = run.parallel.all_reduce(torch.stack([value.float() for value in sums.values()]))
    parts = dict(zip(sums, summed, strict=True))
    return Loss(parts.pop("total"), parts)


def differentiate(run: Run, loss: Tensor, *, last: bool) -> None:
    """Add the gradient of *loss*, for AdaHessian the curvature too."""
    if isinstance(run.optimizer, AdaHessian):
        at = run.at
        run.optimizer.differentiate(loss, derive_seed(run.recipe.seed, "curvature", at.epoch, at.step))
        if last:
            run.optimizer.sum_over(run.parallel.sums)
    else:
        run.parallel.backward(run.precision.scale(loss), last=last)


def stop_unless_finite(run: Run, loss: Loss, norm: Tensor, samples: list[int]) -> bool:
    """Say whether the gradient is finite: only float16's may be not. Raise `TrainingError` for all else.

    Batch norm's buffers have taken the batch in already, the weights have not.
    """
    buffers = float_buffers(run.model)
    finite = all_finite([loss.total, norm, *buffers.values()])
    if int(run.parallel.all_reduce(finite.int())) == run.parallel.world:
        return True
    culprit = first_not_finite(loss) or first_not_finite_tensor(buffers.items())
    if culprit is None and run.recipe.precision == "fp16":
        return False
    culprit = culprit or first_not_finite_tensor(gradients(run.model).items()) or "gradient"
    raise not_finite(culprit, run.at.epoch, run.at.step, samples)


def measure_epoch(run: Run, held_out: PreprocessedDataset, stop: Stop, onlooker: Progress) -> None:
    """Measure the network on the held-out pictures, and its average beside it, and close the epoch."""
    since, epoch = time.monotonic(), run.at.epoch
    run.settle()

    def on_batch(done: int) -> None:
        onlooker.measured(epoch=epoch, done=done)
        stop.check()

    def figures_of(model: nn.Module) -> EvalMetrics:
        return evaluate(
            model,
            held_out,
            run.recipe.preprocess,
            batch_size=run.recipe.batch_size // run.parallel.world,
            workers=run.recipe.workers,
            processes=run.parallel,
            on_batch=on_batch,
        )

    raw = figures_of(run.model)
    average = figures_of(run.average.model) if run.average is not None else None
    sight = look(
        run.model,
        held_out,
        run.normalise,
        run.recipe.batch_size,
        spectra=epoch + 1 in spectrum_epochs(run.recipe.epochs),
    )
    run.after_epoch(raw, average, sight, time.monotonic() - since)
