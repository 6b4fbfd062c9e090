"""One step of training: the gradient over all processes, and the update of the weights."""

import math

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sopdeploy.data.batches import Batch
from sopdeploy.seeds import derive_seed
from sopdeploy.training.loop.losses import Loss, training_loss
from sopdeploy.training.loop.optimizers import AdaHessian
from sopdeploy.training.loop.state import LR_FACTOR, FinishedStep, LoopRun


def train_step(run: LoopRun, batch: Batch, *, num_samples: int, steps: int) -> FinishedStep:
    """Run one of the *steps* steps of an epoch on *batch*, this process' part of the *num_samples* samples.

    Waits for no result of the device. `LoopRun.read_steps` finds a loss, gradient or buffer that is not
    finite, before anything is evaluated or written.
    """
    recipe, position = run.recipe, run.position
    # Each process draws other random numbers; process 0 draws those of a run of a single process.
    rank_key = [run.strategy.rank] if run.strategy.rank > 0 else []
    torch.manual_seed(derive_seed(recipe.seed, "step", position.epoch, position.step, *rank_key))
    time = position.epoch + position.step / steps
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.learning_rate(time, group.get(LR_FACTOR, 1.0))
    run.optimizer.zero_grad()
    loss = compute_gradient(run, (run.normalize(batch[0]), batch[1]), num_samples)
    norm = get_total_norm([parameter.grad for parameter in run.parameters if parameter.grad is not None])
    are_finite = count_finite(run, loss, norm)
    if recipe.optimizer.clip_norm:  # 0 disables clipping
        clip_grads_with_norm_(run.parameters, recipe.optimizer.clip_norm, norm)
    run.optimizer.step()
    if run.ema is not None:
        run.ema.update(run.model)
    return FinishedStep(loss, norm, are_finite, num_samples)


def compute_gradient(run: LoopRun, batch: Batch, num_samples: int) -> Loss:
    """Compute the gradient of a step and return the loss over all processes.

    *batch* has normalized images, this process' part of the *num_samples* samples of the step. The mean loss
    of the part is weighted by its share, so that the sum over the processes is the mean over the step.
    """
    images, targets = batch
    loss = _compute_loss(run, images, targets)
    share = len(targets) / num_samples
    _backward(run, loss.total * share)
    weighted = [(value * share).double() for value in (loss.total.detach(), *loss.parts.values())]
    total, *parts = run.strategy.all_reduce(torch.stack(weighted))
    counts = None if loss.component_counts is None else run.strategy.all_reduce(loss.component_counts)
    return Loss(total, dict(zip(loss.parts, parts, strict=True)), counts)


def _compute_loss(run: LoopRun, images: Tensor, labels: Tensor) -> Loss:
    """Compute the loss of a batch, with that of the teacher if the run has one."""
    bf16 = run.recipe.precision == "bf16"  # second-order layers disable autocast themselves
    with torch.autocast(run.strategy.device.type, torch.bfloat16, enabled=bf16):
        output = run.model(images)
        smoothing, weights = run.recipe.loss.label_smoothing, run.model.loss_weights()
        loss = training_loss(output, labels, weights, smoothing, run.activation)
        return loss if run.teacher is None else run.teacher.add_to(loss, images, labels, output)


def _backward(run: LoopRun, loss: Tensor) -> None:
    """Set the gradient of *loss*, summed over the processes; AdaHessian also needs the curvature."""
    if isinstance(run.optimizer, AdaHessian):
        position = run.position
        run.optimizer.backward(loss, derive_seed(run.recipe.seed, "curvature", position.epoch, position.step))
        run.optimizer.all_reduce(run.strategy.sum_by_parameter)
    else:
        run.strategy.backward(loss, run.trained())


def count_finite(run: LoopRun, loss: Loss, norm: Tensor) -> Tensor:
    """Count the processes in which gradient, loss and all buffers are finite, before weights change."""
    # Batch norm's running statistics, which include this batch already. Their norm is the largest value.
    largest = [get_total_norm(run.float_buffers, math.inf)] if run.float_buffers else []
    finite = torch.stack([value.double() for value in (norm, loss.total, *largest)]).isfinite()
    return run.strategy.all_reduce(finite.all().double())
