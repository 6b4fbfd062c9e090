"""One step of training: the gradient over all processes, and the update of the weights."""

import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sopdeploy.data.batches import Batch
from sopdeploy.seeds import derive_seed
from sopdeploy.training.loop.losses import Loss, training_loss
from sopdeploy.training.loop.optimizer import AdaHessian
from sopdeploy.training.loop.state import LR_FACTOR, FinishedStep, LoopState


def train_step(run: LoopState, batch: Batch, *, num_samples: int, steps: int) -> FinishedStep:
    """Run one of the *steps* steps of an epoch on *batch*, this process' part of the *num_samples* samples.

    A single process waits for no result of the device. `LoopState.read_steps` later finds
    values that are not finite, before a checkpoint is written.
    """
    recipe = run.recipe
    position = run.position

    # Each process draws other random numbers; process 0 draws those of a run of a single
    # process.
    rank_key = [run.strategy.rank] if run.strategy.rank > 0 else []
    torch.manual_seed(
        derive_seed(recipe.seed, "step", position.epoch, position.step, *rank_key)
    )

    time = position.epoch + position.step / steps
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.learning_rate(time, group.get(LR_FACTOR, 1.0))

    run.optimizer.zero_grad()
    pixels, targets = batch
    loss = compute_gradient(run, (run.normalize(pixels), targets), num_samples)
    norm = get_total_norm(
        [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    )

    # Count the processes in which gradient, loss and all buffers are finite, before weights
    # change. The buffers are above all the running statistics of batch norms, which include this
    # batch; their norm is the largest absolute value.
    checked = [norm, loss.total]
    if run.float_buffers:
        checked.append(get_total_norm(run.float_buffers, math.inf))
    is_finite = torch.stack([value.double() for value in checked]).isfinite().all()
    finite_count = run.strategy.all_reduce(is_finite.double())

    if recipe.optimizer.clip_norm:  # 0 disables clipping
        clip_grads_with_norm_(run.parameters, recipe.optimizer.clip_norm, norm)
    run.optimizer.step()
    if run.average is not None:
        run.average.update(run.model)

    return FinishedStep(loss, norm, finite_count, num_samples)


def compute_gradient(run: LoopState, batch: Batch, num_samples: int) -> Loss:
    """Compute the gradient of a step from a *batch* of normalized images; return the loss over all processes.

    Each process computes the mean loss of its batch. It is weighted by the share of the batch in
    the *num_samples* of the step, so that the sum over processes is the mean over the step.
    """
    images, targets = batch
    recipe = run.recipe
    position = run.position

    bf16 = recipe.precision == "bf16"  # second-order layers disable autocast themselves
    with torch.autocast(run.strategy.device.type, torch.bfloat16, enabled=bf16):
        output = run.model(images)
        weights = run.model.loss_weights()
        loss = training_loss(
            output, targets, weights, recipe.loss.label_smoothing, run.activation
        )
        if run.teacher is not None:
            loss = run.teacher.distillation_loss(loss, images, targets, output)

    # The gradient, summed over all processes.
    share = len(targets) / num_samples
    if isinstance(run.optimizer, AdaHessian):  # which also needs the curvature
        seed = derive_seed(recipe.seed, "curvature", position.epoch, position.step)
        run.optimizer.backward(loss.total * share, seed)
        run.optimizer.all_reduce(run.strategy.sum_by_parameter)
    else:
        run.strategy.backward(loss.total * share, run.trained())

    # The values of the loss, summed over all processes, too.
    weighted = [
        (value * share).double() for value in (loss.total.detach(), *loss.parts.values())
    ]
    total, *parts = run.strategy.all_reduce(torch.stack(weighted))

    counts = loss.component_counts
    if counts is not None:
        counts = run.strategy.all_reduce(counts)
    return Loss(total, dict(zip(loss.parts, parts, strict=True)), counts)
